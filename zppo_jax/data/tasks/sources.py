"""Sources from plain dicts: procedural tasks, reasoning-gym, prepared data, files and mixtures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from zppo_jax.core.types import Example
from zppo_jax.data.tasks import arithmetic, common, countdown, modmath

TASKS = {
  'arithmetic': arithmetic.task,
  'countdown': countdown.task,
  'modmath': modmath.task,
}
_OTHERS = ('reasoning_gym', 'tfds')  # further names of `build_source`
_SOURCE_KEYS = ('seed', 'split', 'size')
_PERIOD = 1000  # examples after which a weighted mixture repeats its pattern


@dataclasses.dataclass(frozen=True)
class MixedSource:
  """Several sources as one; item i always comes from the same source and row.

  Without weights every example occurs once. With weights item i follows a fixed pattern whose
  every stretch holds the sources in proportion; a source that runs out starts again.
  """

  sources: tuple[common.TaskSource, ...]
  weights: tuple[float, ...] | None = None
  size: int = 0

  def __post_init__(self):
    if not self.sources or not all(len(s) for s in self.sources):
      raise ValueError('a mixture needs sources, each with at least one example')
    if self.weights is None:
      object.__setattr__(self, 'size', sum(map(len, self.sources)))
      return
    weights = np.asarray(self.weights, np.float64)
    if weights.shape != (len(self.sources),) or not np.all(weights >= 0) or not weights.sum() > 0:
      raise ValueError(
        f'mixture weights {self.weights} must be {len(self.sources)} numbers >= 0, not all 0'
      )
    if not self.size:  # until the first source is used up
      shares = weights / weights.sum()
      size = min(len(s) / w for s, w in zip(self.sources, shares) if w > 0)
      object.__setattr__(self, 'size', max(1, int(size)))

  def __len__(self) -> int:
    return self.size

  @functools.cached_property
  def _pattern(self) -> tuple[np.ndarray, np.ndarray]:
    """(source, occurrence of this source so far) of each place in one period."""
    shares = np.asarray(self.weights) / np.sum(self.weights)
    taken = np.zeros(len(shares), int)
    order, seen = [], []
    for place in range(1, _PERIOD + 1):
      source = int(np.argmax(np.where(shares > 0, shares * place - taken, -np.inf)))
      order.append(source)
      seen.append(taken[source])
      taken[source] += 1
    return np.asarray(order), np.asarray(seen)

  def locate(self, index: int) -> tuple[int, int]:
    """(number of the source, row in it) of item `index`."""
    index = common.check_index(index, self.size)
    if self.weights is None:
      ends = np.cumsum([len(s) for s in self.sources])
      source = int(np.searchsorted(ends, index, side='right'))
      return source, index - int(ends[source - 1] if source else 0)
    order, seen = self._pattern
    turn, place = divmod(index, _PERIOD)
    source = int(order[place])
    row = turn * int(np.sum(order == source)) + int(seen[place])
    return source, row % len(self.sources[source])

  def __getitem__(self, index: int) -> Example:
    source, row = self.locate(index)
    return self.sources[source][row]

  def distractor(self, index: int) -> str:
    """The wrong answer that the item's own source gives."""
    source, row = self.locate(index)
    return self.sources[source].distractor(row)


def mix(
  sources: Sequence[common.TaskSource], weights: Sequence[float] | None = None, size: int = 0
) -> MixedSource:
  """One source of several, see `MixedSource`; `size` 0 stops before a source repeats."""
  return MixedSource(tuple(sources), None if weights is None else tuple(weights), size)


def build_task(name: str, seed: int = 0, split: str = 'train', size: int = 10_000, **settings):
  """A procedural source; `settings` are the fields of the task's Config."""
  task = TASKS[name]()
  fields = [f.name for f in dataclasses.fields(task.config)]
  common.check_keys(name, list(settings), [*fields, *_SOURCE_KEYS, 'name'])
  return common.ProceduralSource(task, task.config(**settings), seed, split, size)


def build_source(spec: dict[str, Any]) -> common.TaskSource:
  """A source from a plain dict; ValueError names unknown keys and the closest known one.

  {'name': 'arithmetic', 'digits': 2, 'seed': 0, 'split': 'train', 'size': 1000} (any of TASKS),
  {'name': 'reasoning_gym', 'dataset': 'chain_sum', 'config': {..}, 'seed', 'split', 'size'},
  {'name': 'tfds', 'dataset': 'zppo_arith/easy', 'data_dir': .., 'split': ..},
  {'path': 'file.jsonl', 'schema': 'auto', ..} (arguments of `files.load_file`),
  {'mix': [spec, ..], 'weights': [..]}.
  """
  spec = dict(spec)
  if 'mix' in spec:
    common.check_keys('mix', list(spec), ['mix', 'weights', 'size'])
    parts = [build_source(part) for part in spec.pop('mix')]
    return mix(parts, **spec)
  if 'path' in spec:
    from zppo_jax.data import files

    common.check_keys('file', list(spec), files.OPTIONS)
    return files.load_file(**spec)
  name = spec.pop('name', None)
  if name in TASKS:
    return build_task(name, **spec)
  if name == 'reasoning_gym':
    from zppo_jax.data.tasks import reasoning_gym

    keys = ['dataset', 'config', 'disjoint', *_SOURCE_KEYS]
    common.check_keys(name, list(spec), keys)
    return reasoning_gym.ReasoningGymSource(spec.pop('dataset'), **spec)
  if name == 'tfds':
    from zppo_jax.data import tfds_builders

    common.check_keys(name, list(spec), ['dataset', 'data_dir', 'split'])
    return tfds_builders.TfdsSource(**spec)
  if name is None:
    raise ValueError(f"a source needs 'name', 'path' or 'mix', got the keys {sorted(spec)}")
  raise common.unknown('source', name, [*TASKS, *_OTHERS])
