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

import jax
import numpy as np

from zppo_jax.core import types
from zppo_jax.mesh import axes, hosts
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.params import Params
from zppo_jax.sampling import decode
from zppo_jax.sampling import slots as slots_lib

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


@dataclasses.dataclass(frozen=True)
class _Job:
  row: int  # of the rollout
  prompt: int
  source: int  # in its prefill


def _check(engine: Engine) -> None:
  for name in ('slots', 'steps', 'prefill'):
    if getattr(engine, name) < 1:
      raise ValueError(f'engine.{name} must be at least 1, got {getattr(engine, name)}')


@functools.partial(jax.jit, static_argnames='settings')
def _assemble(prompts: decode.Prompts, drawn: decode.Responses, settings: decode.Settings,
              version) -> types.Rollout:
  """`decode.assemble` of host copies, its rows cut over the mesh."""
  given = jax.tree.map(lambda x: axes.constrain(x, 'batch', *(None,) * (x.ndim - 1)),
                       (prompts, drawn))
  return decode.assemble(*given, settings, version)


class _Queue:
  """Samples that wait for a slot, prompt by prompt; each prompt is prefilled once."""

  def __init__(self, config, params, prompts: decode.Prompts, settings, size: int):
    self._config, self._params, self._prompts = config, params, prompts
    self._settings, self._group, self._size = settings, settings.group_size, size
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
      self.prefix = slots_lib.prefill(self._config, self._params, self._prompts.tokens[filled],
                             self._prompts.length[filled], settings=self._settings)
      self.prefills += 1
      self._jobs.extend(_Job(p * self._group + s, p, i) for i, p in enumerate(chosen)
                        for s in range(self._group))
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


def run(config: ModelConfig, params: Params, prompts: decode.Prompts, *, key: jax.Array,
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
  kept = np.zeros_like(logp) if settings.filtered else None
  pooled = config.sparse is not None and config.sparse.pool > 0
  traffic = np.zeros((rows, 4), np.int32) if pooled else None
  length, done = np.zeros(rows, np.int32), ~np.repeat(prompts.valid, group)
  queue = _Queue(config, params, prompts, settings, engine.prefill)
  blocks = slots_lib.split_blocks(config, params)
  bucket = prompts.tokens.shape[1]
  slots = slots_lib.empty(config, key, rows=engine.slots, size=bucket + width, prompt=bucket,
                          settings=settings, forced=prompts.forced.shape[1])
  held: list[_Job | None] = [None] * engine.slots
  seen = np.zeros(rows, int)  # tokens of each row that were looked at
  taken, decoded = np.zeros(2, int), np.zeros(2, int)  # while samples waited, and afterwards
  while queue or any(held):
    free = [i for i, job in enumerate(held) if job is None]
    while free and queue:
      jobs = queue.take(len(free))
      target, source, row = _row(prompts, jobs, free, group, engine.slots)
      slots = slots_lib.insert(config, slots, key, queue.prefix, target, source, row)
      for job in jobs:
        held[free.pop(0)] = job
    slots, steps, count = slots_lib.steps(config, blocks, slots, most=engine.steps,
                                          settings=settings)
    found = hosts.fetch((slots.active, slots.tokens, slots.logp, slots.length, slots.done, steps,
                         count, slots.kept, slots_lib.traffic(slots) if pooled else None))
    at = 0 if queue else 1
    taken[at] += found[5]
    decoded[at] += found[6]
    ended = _ended(held, found, seen, stop)
    for i, (size, stopped) in ended.items():
      row = held[i].row
      tokens[row, :size], logp[row, :size] = found[1][i, :size], found[2][i, :size]
      if kept is not None:
        kept[row, :size] = found[7][i, :size]
      if pooled:
        traffic[row] = found[8][i]
      length[row], done[row], held[i] = size, stopped, None
    if stop is not None and any(found[0][i] for i in ended):
      slots = slots_lib.release(slots, np.asarray([job is not None for job in held]))
  rollout = _assemble(prompts, decode.Responses(tokens, logp, length, done, kept, traffic),
                      settings, np.int32(version))
  share = lambda part, steps: float(part / max(1, steps * engine.slots))
  return rollout, Stats(int(taken.sum()), queue.prefills, int(decoded.sum()),
                        share(decoded.sum(), taken.sum()), share(decoded[0], taken[0]))
