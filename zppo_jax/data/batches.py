"""Batches of question ids and of training rows, with a small JSON state that resumes exactly.

Every stream runs over *global* batches: all hosts compute the same ids and each takes its own
stride, so shapes agree everywhere, 1, 2 and 4 hosts see the same global batch, and a state saved
by one number of hosts resumes on another. Examples never get lost between epochs: a batch may
hold the end of one permutation and the start of the next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


def bucket_for(length: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that holds `length`; ValueError names the length and the largest."""
  fitting = [bucket for bucket in buckets if bucket >= length]
  if not fitting:
    raise ValueError(f'length {length} exceeds the largest bucket {max(buckets)}')
  return min(fitting)


def check_buckets(buckets: Sequence[int]) -> tuple[int, ...]:
  """The buckets as a tuple; ValueError unless they are positive and strictly increasing."""
  buckets = tuple(int(b) for b in buckets)
  if not buckets or buckets[0] < 1 or any(a >= b for a, b in zip(buckets, buckets[1:])):
    raise ValueError(f'buckets {buckets} must be positive and strictly increasing')
  return buckets


def pad_rows(
  rows: Sequence[Sequence[int]], length: int, pad_id: int, *, left: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """(int32[N, length] padded rows, bool[N, length] true on real tokens); ValueError if too long."""
  tokens = np.full((len(rows), length), pad_id, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    if len(row) > length:
      raise ValueError(f'row {i} has {len(row)} tokens, more than the padded length {length}')
    where = slice(length - len(row), length) if left else slice(0, len(row))
    tokens[i, where] = np.asarray(row, np.int32)
    mask[i, where] = True
  return tokens, mask


def _check_shards(batch_size: int, shard_index: int, shard_count: int) -> None:
  errors = []
  if shard_count < 1 or not 0 <= shard_index < shard_count:
    errors.append(f'shard_index {shard_index} must be in [0, shard_count {shard_count})')
  elif batch_size < 1 or batch_size % shard_count:
    errors.append(f'batch_size {batch_size} must be a positive multiple of {shard_count} shards')
  if errors:
    raise ValueError('; '.join(errors))


class _ShuffledRows:
  """Endless random-access order, a new permutation each epoch; a source for grain.

  grain's own index shuffle walks cycles of 2**16 places, milliseconds an index on small sources.
  """

  def __init__(self, size: int, seed: int):
    if size < 1:
      raise ValueError('the source is empty')
    if seed < 0:
      raise ValueError(f'seed {seed} must be >= 0')
    self._size, self._seed = size, seed
    self._permutation = functools.lru_cache(maxsize=2)(self._draw)  # a batch may span two epochs

  def _draw(self, epoch: int) -> np.ndarray:
    bits = np.random.Philox(key=[self._seed, 0], counter=[0, 0, 0, epoch])
    return np.random.Generator(bits).permutation(self._size)

  def __len__(self) -> int:
    return np.iinfo(np.int64).max

  def __getitem__(self, index: int) -> int:
    epoch, place = divmod(int(index), self._size)
    return int(self._permutation(epoch)[place])


@dataclasses.dataclass
class PromptStream:
  """Endless iterator over int32[batch_size / shard_count] row numbers; see `prompt_stream`."""

  size: int
  batch_size: int
  seed: int
  shard_index: int
  shard_count: int
  step: int = 0

  def __post_init__(self):
    import grain

    _check_shards(self.batch_size, self.shard_index, self.shard_count)
    order = grain.MapDataset.source(_ShuffledRows(self.size, self.seed))
    local = order[self.shard_index :: self.shard_count].batch(self.batch_size // self.shard_count)
    self._iterator = iter(local.to_iter_dataset(grain.ReadOptions(num_threads=0)))

  def __iter__(self) -> PromptStream:
    return self

  def __next__(self) -> np.ndarray:
    ids = next(self._iterator)
    self.step += 1
    return np.asarray(ids, np.int32)

  @property
  def epoch(self) -> float:
    """Passes over the source so far."""
    return self.step * self.batch_size / self.size

  def get_state(self) -> dict[str, Any]:
    """JSON-able; equal on all hosts."""
    return _identity(self) | {'step': self.step}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues right after the batch that was last taken when the state was saved."""
    _check_state(_identity(self), state)
    self.step = int(state['step'])
    self._iterator.set_state({'next_index': self.step})


def _identity(stream) -> dict[str, int]:
  return {'size': stream.size, 'batch_size': stream.batch_size, 'seed': stream.seed}


def _check_state(own: dict[str, int], state: dict[str, Any]) -> None:
  differing = {k: (state.get(k), v) for k, v in own.items() if state.get(k) != v}
  if differing:
    raise ValueError(f'state of another stream, (saved, this one) differ: {differing}')


def prompt_stream(
  source, *, batch_size: int, seed: int = 0, shard_index: int = 0, shard_count: int = 1
) -> PromptStream:
  """Endless stream of int32[batch_size // shard_count] row numbers into `source`.

  `batch_size` is global. Each epoch is a new permutation; every row occurs exactly once per epoch.
  `get_state()` / `set_state()` take a JSON dict. ValueError on an uneven batch or a bad shard.
  """
  return PromptStream(len(source), batch_size, seed, shard_index, shard_count)


def eval_batches(
  source, *, batch_size: int, shard_index: int = 0, shard_count: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """One ordered pass: (int32[B] rows, bool[B] valid), B = batch_size / shard_count, global batches.

  The last batch repeats row 0 with valid = False, so that all hosts run equally many steps.
  """
  _check_shards(batch_size, shard_index, shard_count)
  for start in range(0, len(source), batch_size):
    rows = np.arange(start, start + batch_size, dtype=np.int32)[shard_index::shard_count]
    valid = rows < len(source)
    yield np.where(valid, rows, 0), valid


@dataclasses.dataclass
class SftStream:
  """Endless iterator over padded training batches; see `sft_stream`."""

  rows: Any
  batch_size: int
  buckets: tuple[int, ...]
  pad_id: int
  seed: int
  shard_index: int
  shard_count: int
  drop_long: bool
  position: int = 0
  dropped: int = 0

  def __post_init__(self):
    _check_shards(self.batch_size, self.shard_index, self.shard_count)
    self.buckets = check_buckets(self.buckets)
    self.size = len(self.rows)
    self._order = _ShuffledRows(self.size, self.seed)
    self._waiting: dict[int, list[int]] = {bucket: [] for bucket in self.buckets}
    self._rendered: dict[int, Any] = {}  # rows of `_waiting`, so that none is rendered twice

  def __iter__(self) -> SftStream:
    return self

  def _bucket(self, row: int) -> int | None:
    """Bucket of a row, None (and counted) if it is too long and may be dropped."""
    pair = self.rows[row]
    length = len(pair[0])
    if length <= self.buckets[-1]:
      self._rendered[row] = pair
      return bucket_for(length, self.buckets)
    if not self.drop_long:
      raise ValueError(
        f'row {row}: length {length} exceeds the largest bucket {self.buckets[-1]}; '
        "raise the buckets or pass on_long='drop'"
      )
    self.dropped += 1
    return None

  def __next__(self) -> dict[str, np.ndarray]:
    refused = 0
    while True:
      row = self._order[self.position]
      bucket = self._bucket(row)
      self.position += 1
      refused = 0 if bucket is not None else refused + 1
      if refused >= 2 * self.size:
        raise ValueError(f'no row of {self.size} fits the largest bucket {self.buckets[-1]}')
      if bucket is None:
        continue
      waiting = self._waiting[bucket]
      waiting.append(row)
      if len(waiting) == self.batch_size:
        self._waiting[bucket] = []
        batch = self._collate(waiting[self.shard_index :: self.shard_count], bucket)
        for i in waiting:
          self._rendered.pop(i, None)
        return batch

  def _collate(self, ids: list[int], bucket: int) -> dict[str, np.ndarray]:
    pairs = [self._rendered[i] if i in self._rendered else self.rows[i] for i in ids]
    tokens, mask = pad_rows([tokens for tokens, _ in pairs], bucket, self.pad_id)
    loss_mask, _ = pad_rows([loss for _, loss in pairs], bucket, 0)
    return {
      'tokens': tokens,
      'mask': mask,
      'loss_mask': loss_mask.astype(bool),
      'row': np.asarray(ids, np.int32),
    }

  def get_state(self) -> dict[str, Any]:
    """JSON-able; equal on all hosts; holds the rows that wait for their batch to fill."""
    waiting = {str(bucket): list(rows) for bucket, rows in self._waiting.items()}
    place = {'position': self.position, 'dropped': self.dropped, 'waiting': waiting}
    return _identity(self) | {'buckets': list(self.buckets)} | place

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues right after the batch that was last taken when the state was saved."""
    _check_state(_identity(self) | {'buckets': list(self.buckets)}, state)
    self.position, self.dropped = int(state['position']), int(state['dropped'])
    self._waiting = {bucket: list(state['waiting'][str(bucket)]) for bucket in self.buckets}


def sft_stream(
  source_rows,
  *,
  batch_size: int,
  buckets: Sequence[int],
  pad_id: int,
  seed: int = 0,
  shard_index: int = 0,
  shard_count: int = 1,
  on_long: str = 'error',
) -> SftStream:
  """Endless stream of {'tokens' i32[B, L], 'mask', 'loss_mask' bool[B, L], 'row' i32[B]}.

  `source_rows[i]` is (tokens int[n], loss_mask bool[n]) (see `render_rows`); L is the bucket, all
  rows of a batch share it, and B = batch_size / shard_count. A row waits until its bucket is
  full; none is lost. `on_long` 'error' raises ValueError, 'drop' counts in `.dropped`.
  """
  if on_long not in ('error', 'drop'):
    raise ValueError(f"on_long {on_long!r} must be 'error' or 'drop'")
  drop = on_long == 'drop'
  return SftStream(
    source_rows, batch_size, tuple(buckets), pad_id, seed, shard_index, shard_count, drop
  )


@dataclasses.dataclass(frozen=True)
class RenderedRows:
  """A task source as training rows, rendered on access; see `render_rows`."""

  source: Any
  tokenizer: Any
  template: Any

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    from zppo_jax.data import templates

    return templates.render_example(self.tokenizer, self.source[index], self.template)


def render_rows(source, tokenizer, template) -> RenderedRows:
  """Rows for `sft_stream`: each example's question and solution as (tokens, loss_mask)."""
  return RenderedRows(source, tokenizer, template)
