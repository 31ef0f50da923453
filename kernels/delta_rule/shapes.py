"""Cases that tests, ahead-of-time compiles and benchmarks share, and how close is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

# Relative RMS error against the reference in float64. Equal keys with a rate near 2 make I + M as
# ill-conditioned as it gets.
TOLERANCE: Mapping[str, float] = {'float32': 1e-5, 'bfloat16': 2e-2}
TOLERANCE_HARD = 2e-4
ARGUMENTS = ('q', 'write_key', 'erase_key', 'value', 'log_decay', 'state')


@dataclasses.dataclass(frozen=True)
class Case:
  """Shapes and the kind of numbers in them.

  keys: normal, equal, positive; rate: of the delta rule, or 'random' in (0, 1); decay: 'mild'
  (about -0.1 nats per token), 'none', 'sparse' (-50 at some tokens), 'dense' (-50 at all), 'mixed'
  (0 and -50 by turns, channel by channel).
  """

  time: int
  heads: int = 2
  key_heads: int = 2
  key: int = 16
  value: int = 16
  batch: int = 2
  keys: str = 'normal'
  rate: float | str = 'random'
  decay: str = 'mild'
  scalar_decay: bool = False
  segments: bool = False

  def __str__(self):
    default = Case(self.time)
    changed = [f'{f.name}={getattr(self, f.name)}' for f in dataclasses.fields(self)
               if getattr(self, f.name) != getattr(default, f.name)]
    return ','.join([f'T={self.time}', *changed])

  @property
  def hard(self) -> bool:
    return self.keys == 'equal' and isinstance(self.rate, float) and self.rate > 1.5


def make(case: Case, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
  """(arguments in float64, segment_ids or None): KDA inputs with rates of the case."""
  rng = np.random.default_rng(seed)

  def unit(x):
    return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)

  shape = case.batch, case.time
  q = unit(rng.normal(size=(*shape, case.key_heads, case.key)))
  key = rng.normal(size=(*shape, case.key_heads, case.key))
  if case.keys == 'equal':
    key = np.broadcast_to(key[:, :1], key.shape)
  key = unit(np.abs(key) if case.keys == 'positive' else key)
  rate = (rng.uniform(size=(*shape, case.heads, 1)) if case.rate == 'random' else
          np.full((*shape, case.heads, 1), case.rate))
  wide = np.repeat(key, case.heads // case.key_heads, axis=2)
  value = rate * rng.normal(size=(*shape, case.heads, case.value))
  state = rng.normal(size=(case.batch, case.heads, case.key, case.value))
  found = dict(q=q, write_key=key, erase_key=rate * wide, value=value,
               log_decay=_decay(case, rng), state=state)
  return found, _segments(case, rng) if case.segments else None


def _decay(case: Case, rng) -> np.ndarray:
  width = 1 if case.scalar_decay else case.key
  shape = case.batch, case.time, case.heads, width
  if case.decay == 'mild':
    return -np.exp(rng.normal(size=shape) - 2.5)
  if case.decay == 'none':
    return np.zeros(shape)
  if case.decay == 'dense':
    return np.full(shape, -50.)
  share = 0.1 if case.decay == 'sparse' else 0.5
  return np.where(rng.uniform(size=shape) < share, -50., 0.)


def _segments(case: Case, rng) -> np.ndarray:
  """Runs with borders at and beside the edges of chunks, and padding (0) between and behind."""
  ids = np.ones((case.batch, case.time), np.int32)
  for number, border in enumerate((1, 31, 32, 63, 64, 65, 100, 130)):
    ids[:, border:] = (number + 2) * (number % 3 != 2)
  ids[-1] = np.cumsum(rng.uniform(size=case.time) < 0.1)
  return ids


SMALL = (Case(1), Case(7), Case(63), Case(64), Case(65))
ACCURACY = SMALL + (
  Case(1000, heads=4, key_heads=2, key=32, value=16), Case(65, scalar_decay=True),
  Case(80, key=16, value=256, heads=1, key_heads=1), Case(80, key=256, value=32, batch=1),
  Case(100, heads=6, key_heads=2, segments=True), Case(150, scalar_decay=True, segments=True),
  Case(100, rate=1e-6), Case(100, rate=1.), Case(100, rate=1.99),
  Case(100, decay='none'), Case(100, decay='sparse'), Case(100, decay='dense'),
  Case(100, decay='mixed'), Case(100, decay='mixed', scalar_decay=True),
  Case(100, keys='equal', rate=.9, decay='none'), Case(100, keys='equal', rate=1.99, decay='none'),
  Case(100, keys='positive', rate=.9, decay='none'), Case(100, keys='positive', rate=1.99))
