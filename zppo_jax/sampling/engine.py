"""Continuous batching: a fixed number of slots, each refilled when its row is done.

The same rows as `decode.generate`: noise belongs to (key, request, sample, index), so neither the
number of slots nor the order of refills changes a token. Three programs of static shapes: prefill
of a few prompts, insertion of their samples into free slots, and a loop of decode steps that hands
back to the host (`slots`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np

from zppo_jax.core import trees, types
from zppo_jax.mesh import axes, hosts
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.params import Params
from zppo_jax.sampling import decode
from zppo_jax.sampling import slots as slots_lib

Stop = Callable[[Sequence[int], int], int | None]  # as `stops.stop_strings` makes it
Refresh = Callable[[], tuple[Params, int] | None]  # newer weights and their version, or None


@dataclasses.dataclass(frozen=True)
class Engine:
  """Shapes of the programs. Few steps free slots early, many keep the host out of the way."""

  slots: int
  steps: int = 16  # tokens between two looks of the host
  prefill: int = 4  # prompts at once
  refresh: Literal['keep', 'drain'] = 'keep'  # rows in flight go on with newer weights, or end


@dataclasses.dataclass(frozen=True)
class Stats:
  """What a call took."""

  decode_steps: int
  prefills: int  # calls of the prefill program
  tokens: int  # sampled or forced, stop tokens included
  occupancy: float  # share of the slots that decoded a token, over the steps
  waiting: float  # the same over the steps during which samples waited for a slot


@dataclasses.dataclass(frozen=True)
class _Job:
  row: int  # of the rollout
  prompt: int
  source: int  # in its prefill


def _check(engine: Engine) -> None:
  for name in ('slots', 'steps', 'prefill'):
    if getattr(engine, name) < 1:
      raise ValueError(f'engine.{name} must be at least 1, got {getattr(engine, name)}')
  if engine.refresh not in ('keep', 'drain'):
    raise ValueError(f"engine.refresh must be 'keep' or 'drain', got {engine.refresh!r}")


def _check_prompts(config: ModelConfig, prompts: decode.Prompts, settings: decode.Settings) -> None:
  """Raises ValueError naming the first row and value out of bounds; invalid rows are not looked at.
  """
  bucket, room = prompts.tokens.shape[1], settings.max_new_tokens
  if max(settings.eos_ids) >= config.vocab or settings.top_k > config.vocab:
    raise ValueError(f'eos_ids must be below, and top_k at most, the vocabulary of {config.vocab}, '
                     f'got {settings.eos_ids} and {settings.top_k}')
  most = min(room, prompts.forced.shape[1])
  first = lambda ids, length: np.where(np.arange(ids.shape[1])[None] < length[:, None], ids, 0)
  ids = np.concatenate([first(prompts.tokens, prompts.length),
                        first(prompts.forced, prompts.forced_length)], axis=1)
  outside = (ids < 0) | (ids >= config.vocab)
  checks = (
    ((prompts.length < 1) | (prompts.length > bucket),
     f'must have 1..{bucket} tokens, got', prompts.length),
    ((prompts.forced_length < 0) | (prompts.forced_length > most),
     f'has room to force {most} tokens, got', prompts.forced_length),
    (outside.any(axis=1), f'must have token ids in 0..{config.vocab - 1}, got',
     np.take_along_axis(ids, outside.argmax(axis=1)[:, None], axis=1)[:, 0]))
  for bad, what, values in checks:
    for row in np.flatnonzero(bad & prompts.valid)[:1]:
      raise ValueError(f'prompts: row {row} {what} {values[row]}')


@functools.partial(jax.jit, static_argnames='settings')
def _assemble(prompts: decode.Prompts, drawn: decode.Responses, settings: decode.Settings,
              version) -> types.Rollout:
  """`decode.assemble` of host copies, its rows cut over the mesh."""
  return decode.assemble(*axes.constrain_rows((prompts, drawn)), settings, version)


class _Weights:
  """The weights in use, and newer ones that wait for the rows in flight to end."""

  def __init__(self, config: ModelConfig, params: Params, version: int, engine: Engine,
               refresh: Refresh | None):
    self._config, self._drain, self._refresh = config, engine.refresh == 'drain', refresh
    self._newer = None
    self._use(params, version)

  def _use(self, params: Params, version: int) -> None:
    self.params, self.version = params, version
    self.blocks = slots_lib.split_blocks(self._config, params)

  @property
  def waiting(self) -> bool:
    return self._newer is not None

  def look(self, idle: bool) -> bool:
    """Whether other weights are in use from now on; `idle`: no row is in flight."""
    if self._refresh is None:
      return False
    newer = self._refresh()
    if newer is not None:
      for path, want, have in trees.differences(*map(trees.named_leaves, (self.params, newer[0]))):
        raise ValueError(f'refresh: {path} must be {want}, got {have}')
      self._newer = newer
    if self._newer is None or (self._drain and not idle):
      return False
    self._use(*self._newer)
    self._newer = None
    return True


class _Queue:
  """Samples that wait for a slot, prompt by prompt; each prompt is prefilled once."""

  def __init__(self, config: ModelConfig, weights: _Weights, prompts: decode.Prompts,
               settings: decode.Settings, size: int):
    self._config, self._weights, self._prompts = config, weights, prompts
    self._settings, self._size = settings, size
    self._left = collections.deque(np.flatnonzero(prompts.valid).tolist())
    self._jobs: collections.deque[_Job] = collections.deque()
    self._chosen: list[int] = []
    self.prefix, self.prefills = None, 0

  def __bool__(self) -> bool:
    return bool(self._left or self._jobs)

  def prefill(self) -> None:
    """Reads the prompts whose samples wait, with the weights in use."""
    if self._jobs:
      at = np.asarray(self._chosen + [self._chosen[0]] * (self._size - len(self._chosen)))
      self.prefix = slots_lib.prefill(self._config, self._weights.params, self._prompts.tokens[at],
                                      self._prompts.length[at], settings=self._settings)
      self.prefills += 1

  def take(self, count: int) -> list[_Job]:
    """At most `count` samples of one prefill, which is then `prefix`."""
    if not self._jobs and self._left:
      group = self._settings.group_size
      self._chosen = [self._left.popleft() for _ in range(min(self._size, len(self._left)))]
      self._jobs.extend(_Job(p * group + s, p, i) for i, p in enumerate(self._chosen)
                        for s in range(group))
      self.prefill()
    return [self._jobs.popleft() for _ in range(min(count, len(self._jobs)))]


def _row(prompts: decode.Prompts, jobs: list[_Job], free: list[int], group: int, slots: int):
  """(target, source, row) of `slots.insert`, filled up with samples that go nowhere."""
  blank = slots - len(jobs)
  target = np.asarray(free[:len(jobs)] + [slots] * blank, np.int32)
  prompt = np.asarray([j.prompt for j in jobs] + [0] * blank, np.int32)
  source = np.asarray([j.source for j in jobs] + [0] * blank, np.int32)
  sample = np.asarray([j.row % group for j in jobs] + [0] * blank, np.int32)
  row = (prompts.length[prompt], prompts.request[prompt], sample, prompts.forced[prompt],
         prompts.forced_length[prompt])
  return target, source, row


class _Rows:
  """What the host knows of all rows, and which of them the slots hold."""

  def __init__(self, prompts: decode.Prompts, settings: decode.Settings, slots: int, pooled: bool):
    rows, width = len(prompts.length) * settings.group_size, settings.max_new_tokens
    logp = np.zeros((rows, width), np.float32)
    self.drawn = decode.Responses(
      tokens=np.zeros((rows, width), np.int32), logp=logp, length=np.zeros(rows, np.int32),
      done=~np.repeat(prompts.valid, settings.group_size), fault=np.zeros(rows, bool),
      kept=np.zeros_like(logp) if settings.filtered else None,
      traffic=np.zeros((rows, 4), np.int32) if pooled else None)
    self.version = np.zeros((rows, width), np.int32)  # of the weights that made a token's logits
    self.held: list[_Job | None] = [None] * slots
    self._seen = np.zeros(slots, int)  # tokens of each slot's row that were looked at
    self._next = np.zeros(slots, int)  # version of each slot's next logits

  @property
  def free(self) -> list[int]:
    return [slot for slot, job in enumerate(self.held) if job is None]

  def enter(self, jobs: list[_Job], version: int) -> None:
    """The jobs take the first free slots."""
    for slot, job in zip(self.free, jobs):
      self.held[slot], self._seen[slot], self._next[slot] = job, 0, version

  def look(self, found: decode.Responses, active: np.ndarray, version: int, stop: Stop | None
           ) -> bool:
    """Frees the slots of rows that are over; whether one of them would be drawn on."""
    cut = False
    for slot, job in enumerate(self.held):
      if job is None:
        continue
      row, size, seen = job.row, int(found.length[slot]), int(self._seen[slot])
      self.version[row, seen:seen + 1] = self._next[slot]
      self.version[row, seen + 1:size] = version
      self._seen[slot], self._next[slot] = size, version
      at = None if stop is None else stop(found.tokens[slot, :size], seen)
      if at is None and active[slot]:
        continue
      if at is None:
        ended = bool(found.done[slot]), bool(found.fault[slot])
      else:
        size, ended = at, (True, False)  # a fault behind it was never read
      self._store(slot, row, found, size, ended)
      self.held[slot], cut = None, cut or bool(active[slot])
    return cut

  def _store(self, slot: int, row: int, found: decode.Responses, size: int,
             ended: tuple[bool, bool]) -> None:
    mine = self.drawn
    mine.length[row], (mine.done[row], mine.fault[row]) = size, ended
    for name in ('tokens', 'logp', 'kept'):
      if getattr(mine, name) is not None:
        getattr(mine, name)[row, :size] = getattr(found, name)[slot, :size]
    if mine.traffic is not None:
      mine.traffic[row] = found.traffic[slot]


def run(config: ModelConfig, params: Params, prompts: decode.Prompts, *, key: jax.Array,
        settings: decode.Settings, engine: Engine, version: int = 0, stop: Stop | None = None,
        refresh: Refresh | None = None) -> tuple[types.Rollout, Stats]:
  """`decode.generate` through slots: (the same rollout, what it took). `prompts` on the host.

  `stop`(tokens, begin) looks at every row between the calls of the decode program: a row ends
  behind as many tokens as it says, as if by a stop token. `refresh`() is asked there for newer
  weights, in every process alike; a token has the version of the weights that made its logits.
  Raises ValueError on bad shapes and settings, and on weights of another structure.
  """
  _check(engine)
  decode.check_settings(settings)
  prompts = jax.tree.map(np.asarray, hosts.fetch(prompts))
  _check_prompts(config, prompts, settings)
  weights = _Weights(config, params, version, engine, refresh)
  rows = _Rows(prompts, settings, engine.slots, config.pooled)
  queue = _Queue(config, weights, prompts, settings, engine.prefill)
  bucket = prompts.tokens.shape[1]
  slots = slots_lib.empty(config, key, rows=engine.slots, size=bucket + settings.max_new_tokens,
                          prompt=bucket, settings=settings, forced=prompts.forced.shape[1])
  taken, decoded = np.zeros(2, int), np.zeros(2, int)  # while samples waited, and afterwards
  while queue or any(rows.held):
    if weights.look(idle=not any(rows.held)):
      queue.prefill()
    while (free := rows.free) and queue and not weights.waiting:
      jobs = queue.take(len(free))
      slots = slots_lib.insert(config, slots, key, queue.prefix,
                               *_row(prompts, jobs, free, settings.group_size, engine.slots))
      rows.enter(jobs, weights.version)
    slots, *took = slots_lib.steps(config, weights.blocks, slots, most=engine.steps,
                                   settings=settings)
    found, active, (steps, count) = hosts.fetch((
      decode.Responses(slots.tokens, slots.logp, slots.length, slots.done, slots.fault, slots.kept,
                       slots_lib.traffic(slots) if config.pooled else None), slots.active, took))
    at = 0 if queue else 1
    taken[at] += steps
    decoded[at] += count
    if rows.look(found, active, weights.version, stop):
      slots = slots_lib.release(slots, np.asarray([job is not None for job in rows.held]))
  rollout = _assemble(prompts, rows.drawn, settings,
                      np.int32(version) if refresh is None else rows.version)
  share = lambda part, steps: float(part / max(1, steps * engine.slots))
  return rollout, Stats(int(taken.sum()), queue.prefills, int(decoded.sum()),
                        share(decoded.sum(), taken.sum()), share(decoded[0], taken[0]))
