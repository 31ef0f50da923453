"""Continuous batching: a fixed number of slots, each refilled when its row is done.

The same rows as `decode.generate`: noise belongs to (key, request, sample, index), so neither the
number of slots nor the order of refills changes a token. Three programs of static shapes: prefill
of a few prompts, insertion of their samples into free slots, and a loop of decode steps that hands
back to the host. Dims: B slots, P prompts of a prefill, L prompt bucket, R response bucket.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from zppo_jax.core import types
from zppo_jax.core.errors import UserError
from zppo_jax.mesh import axes, hosts
from zppo_jax.models import cache as cache_lib
from zppo_jax.models import decoder
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.params import Params
from zppo_jax.sampling import decode

Array = jax.Array
Stop = Callable[[Sequence[int], int], int | None]  # as `stops.stop_strings` makes it


@dataclasses.dataclass(frozen=True)
class Engine:
  """Shapes of the programs. Few steps free slots early, many keep the host out of the way."""

  slots: int
  steps: int = 16  # tokens between two looks of the host
  prefill: int = 4  # prompts at once


@dataclasses.dataclass(frozen=True)
class Stats:
  """What a call took."""

  decode_steps: int
  prefills: int  # calls of the prefill program
  tokens: int  # sampled or forced, stop tokens included
  occupancy: float  # share of the slots that decoded a token, over the steps
  waiting: float  # the same over the steps during which samples waited for a slot


@types.record
class Slots:
  """Rows in flight. A split cache whose rows hold prompt and response in one piece."""

  cache: cache_lib.Cache
  logits: Array  # f32[B, V], of the next token
  tokens: Array  # i32[B, R]
  logp: Array  # f32[B, R]
  length: Array  # i32[B], response tokens so far
  active: Array  # bool[B]
  done: Array  # bool[B], ended by a stop token
  keys: Array  # key[B]
  forced: Array  # i32[B, F]
  forced_length: Array  # i32[B]
  seen: decode.Seen | None  # where the settings penalise


@dataclasses.dataclass(frozen=True)
class _Job:
  row: int  # of the rollout
  prompt: int
  source: int  # in its prefill


def _check(engine: Engine) -> None:
  for name in ('slots', 'steps', 'prefill'):
    if getattr(engine, name) < 1:
      raise ValueError(f'engine.{name} must be at least 1, got {getattr(engine, name)}')
  if jax.process_count() > 1:
    raise UserError(f'slots: one process is needed so far, the run has {jax.process_count()}')


@functools.partial(jax.jit, static_argnames=('config', 'engine', 'settings', 'bucket', 'forced'))
def _empty(config: ModelConfig, key: Array, *, engine: Engine, settings: decode.Settings,
           bucket: int, forced: int) -> Slots:
  rows, width = engine.slots, settings.max_new_tokens
  cache = cache_lib.split(config, rows, bucket + width)
  zeros = jnp.zeros(rows, jnp.int32)
  return Slots(
    cache=dataclasses.replace(cache, length=zeros), logits=jnp.zeros((rows, config.vocab)),
    tokens=jnp.zeros((rows, width), jnp.int32), logp=jnp.zeros((rows, width)), length=zeros,
    active=zeros > 0, done=zeros > 0, keys=decode.row_keys(key, zeros, zeros),
    forced=jnp.zeros((rows, forced), jnp.int32), forced_length=zeros,
    seen=None if not settings.penalises else decode.Seen(
      jnp.zeros((rows, config.vocab), jnp.int32), jnp.zeros((rows, config.vocab), bool)))


@functools.partial(jax.jit, static_argnames=('config',))
def _prefill(config: ModelConfig, params: Params, tokens: Array, length: Array):
  """(cache by layer, logits, tokens that it holds) of prompts i32[P, L]."""
  cache, logits = decode.prefill(config, params, axes.constrain(tokens, 'batch', None), length)
  held = decode.seen_prompts(config, tokens, length)
  return cache_lib.unstack(config, cache.layers), logits, held


@functools.partial(jax.jit, donate_argnums=0)
def _insert(slots: Slots, key: Array, prefix, target: Array, source: Array, row) -> Slots:
  """Sample i of a prefill enters slot target[i] (B or more: nobody does) from prompt source[i].

  `prefix` = (layers, logits, seen) of the prefill; `row` = (length, request, sample, forced,
  forced_length) of each sample.
  """
  layers, logits, prompt = prefix
  length, request, sample, forced, forced_length = row

  def put(old, new):
    return old.at[target].set(new, mode='drop')

  def rows(old, new):  # states of a recurrence, or the first columns of a cache of keys
    new = new[source]
    if old.shape[1:] == new.shape[1:]:
      return put(old, new)
    return old.at[target, :, :new.shape[2]].set(new, mode='drop')

  cache = cache_lib.Cache(jax.tree.map(rows, slots.cache.layers, layers),
                          put(slots.cache.length, length), split=True)
  zero, seen = jnp.zeros_like(length), slots.seen
  if seen is not None:
    blank = jnp.zeros((len(length), prompt.shape[1]), jnp.int32)
    seen = decode.Seen(put(seen.counts, blank), put(seen.prompt, prompt[source]))
  return Slots(
    cache=cache, logits=put(slots.logits, logits[source]),
    tokens=put(slots.tokens, jnp.zeros((len(length), slots.tokens.shape[1]), jnp.int32)),
    logp=put(slots.logp, jnp.zeros((len(length), slots.logp.shape[1]))),
    length=put(slots.length, zero), active=put(slots.active, zero == 0),
    done=put(slots.done, zero > 0), keys=put(slots.keys, decode.row_keys(key, request, sample)),
    forced=put(slots.forced, forced), forced_length=put(slots.forced_length, forced_length),
    seen=seen)


@functools.partial(jax.jit, static_argnames=('config', 'engine', 'settings'), donate_argnums=2)
def _steps(config: ModelConfig, params: Params, slots: Slots, *, engine: Engine,
           settings: decode.Settings):
  """(slots after at most engine.steps tokens each, steps taken, tokens decoded); `params` split."""
  eos = jnp.asarray(settings.eos_ids, jnp.int32)
  width = settings.max_new_tokens
  column = jnp.arange(width)[None]

  def body(carry):
    s, taken, count = carry
    token, logp = decode.choose(s.logits, s.keys, s.length, settings, s.seen)
    token, logp = decode.force(token, logp, s.forced, s.forced_length, s.length)
    here = (column == s.length[:, None]) & s.active[:, None]
    stopped = s.active & jnp.any(token[:, None] == eos, axis=1)
    out = decoder.forward(config, params, token[:, None], cache=s.cache, want='hidden',
                          segment_ids=s.active[:, None].astype(jnp.int32))
    length = s.length + s.active
    return Slots(
      cache=out.cache, logits=decoder.unembed(config, params, out.hidden[:, 0]),
      tokens=jnp.where(here, token[:, None], s.tokens), logp=jnp.where(here, logp[:, None], s.logp),
      length=length, active=s.active & ~stopped & (length < width), done=s.done | stopped,
      keys=s.keys, forced=s.forced, forced_length=s.forced_length,
      seen=None if s.seen is None else s.seen.add(token, s.active)), taken + 1, count + jnp.sum(
        s.active, dtype=jnp.int32)

  def go_on(carry):
    return (carry[1] < engine.steps) & jnp.any(carry[0].active)

  return jax.lax.while_loop(go_on, body, (slots, jnp.int32(0), jnp.int32(0)))


@functools.partial(jax.jit, donate_argnums=0)
def _release(slots: Slots, stay: Array) -> Slots:
  """Slots outside `stay` decode no more."""
  return dataclasses.replace(slots, active=slots.active & stay)


_split_blocks = jax.jit(decoder.split_blocks, static_argnums=0)
_assemble = jax.jit(decode.assemble, static_argnames='settings')


class _Queue:
  """Samples that wait for a slot, prompt by prompt; each prompt is prefilled once."""

  def __init__(self, config, params, prompts: decode.Prompts, group: int, size: int):
    self._config, self._params, self._prompts = config, params, prompts
    self._group, self._size = group, size
    self._left = collections.deque(np.flatnonzero(prompts.valid).tolist())
    self._jobs: collections.deque[_Job] = collections.deque()
    self.prefix, self.prefills = None, 0

  def __bool__(self) -> bool:
    return bool(self._left or self._jobs)

  def take(self, count: int) -> list[_Job]:
    """At most `count` samples of one prefill, which is then `prefix`."""
    if not self._jobs and self._left:
      chosen = [self._left.popleft() for _ in range(min(self._size, len(self._left)))]
      filled = np.asarray(chosen + [chosen[0]] * (self._size - len(chosen)))
      self.prefix = _prefill(self._config, self._params, self._prompts.tokens[filled],
                             self._prompts.length[filled])
      self.prefills += 1
      self._jobs.extend(_Job(p * self._group + s, p, i) for i, p in enumerate(chosen)
                        for s in range(self._group))
    return [self._jobs.popleft() for _ in range(min(count, len(self._jobs)))]


def _row(prompts: decode.Prompts, jobs: list[_Job], free: list[int], group: int, slots: int):
  """(target, source, row) of `_insert`, filled up with samples that go nowhere."""
  blank = slots - len(jobs)
  target = np.asarray(free[:len(jobs)] + [slots] * blank, np.int32)
  prompt = np.asarray([j.prompt for j in jobs] + [0] * blank, np.int32)
  source = np.asarray([j.source for j in jobs] + [0] * blank, np.int32)
  sample = np.asarray([j.row % group for j in jobs] + [0] * blank, np.int32)
  row = (prompts.length[prompt], prompts.request[prompt], sample, prompts.forced[prompt],
         prompts.forced_length[prompt])
  return target, source, row


def _ended(held, found, seen: np.ndarray, stop: Stop | None) -> dict[int, tuple[int, bool]]:
  """{slot: (tokens, by a stop)} of the rows that are over."""
  active, tokens, _, length, done = found[:5]
  over = {}
  for i, job in enumerate(held):
    if job is None:
      continue
    size = int(length[i])
    at = None if stop is None else stop(tokens[i, :size].tolist(), int(seen[job.row]))
    seen[job.row] = size
    if at is not None:
      over[i] = at, True
    elif not active[i]:
      over[i] = size, bool(done[i])
  return over


def run(config: ModelConfig, params: Params, prompts: decode.Prompts, *, key: Array,
        settings: decode.Settings, engine: Engine, version: int = 0, stop: Stop | None = None
        ) -> tuple[types.Rollout, Stats]:
  """`decode.generate` through slots: (the same rollout, what it took). `prompts` on the host.

  `stop`(tokens, begin) looks at every row between the calls of the decode program: a row ends
  behind as many tokens as it says, as if by a stop token.
  """
  _check(engine)
  decode.check_settings(settings)
  prompts = jax.tree.map(np.asarray, hosts.fetch(prompts))
  group, width = settings.group_size, settings.max_new_tokens
  rows = len(prompts.length) * group
  tokens, logp = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.float32)
  length, done = np.zeros(rows, np.int32), ~np.repeat(prompts.valid, group)
  queue = _Queue(config, params, prompts, group, engine.prefill)
  blocks = _split_blocks(config, params)
  slots = _empty(config, key, engine=engine, settings=settings, bucket=prompts.tokens.shape[1],
                 forced=prompts.forced.shape[1])
  held: list[_Job | None] = [None] * engine.slots
  seen = np.zeros(rows, int)  # tokens of each row that were looked at
  taken, decoded = np.zeros(2, int), np.zeros(2, int)  # while samples waited, and afterwards
  while queue or any(held):
    free = [i for i, job in enumerate(held) if job is None]
    while free and queue:
      jobs = queue.take(len(free))
      target, source, row = _row(prompts, jobs, free, group, engine.slots)
      slots = _insert(slots, key, queue.prefix, target, source, row)
      for job in jobs:
        held[free.pop(0)] = job
    slots, steps, count = _steps(config, blocks, slots, engine=engine, settings=settings)
    found = hosts.fetch((slots.active, slots.tokens, slots.logp, slots.length, slots.done, steps,
                         count))
    at = 0 if queue else 1
    taken[at] += found[5]
    decoded[at] += found[6]
    ended = _ended(held, found, seen, stop)
    for i, (size, stopped) in ended.items():
      row = held[i].row
      tokens[row, :size], logp[row, :size] = found[1][i, :size], found[2][i, :size]
      length[row], done[row], held[i] = size, stopped, None
    if stop is not None and any(found[0][i] for i in ended):
      slots = _release(slots, np.asarray([job is not None for job in held]))
  rollout = _assemble(prompts, decode.Responses(tokens, logp, length, done), settings,
                      np.int32(version))
  share = lambda part, steps: float(part / max(1, steps * engine.slots))
  return rollout, Stats(int(taken.sum()), queue.prefills, int(decoded.sum()),
                        share(decoded.sum(), taken.sum()), share(decoded[0], taken[0]))
