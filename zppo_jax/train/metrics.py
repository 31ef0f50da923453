"""Metric files, progress and phase times of a run.

What the run computes goes to `metrics.jsonl` and `metrics.csv`; what a clock or the machine reads
goes to `timing.jsonl`. So the first two files of a resumed run equal those of an unbroken one byte
for byte.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from zppo_jax.train.progress import Progress

METRICS, TABLE, TIMING = 'metrics.jsonl', 'metrics.csv', 'timing.jsonl'
TIMING_PREFIXES = ('time/', 'tokens_per_s', 'compile_count', 'memory')

__all__ = ['MetricWriter', 'PhaseTimer', 'Progress', 'is_timing', 'read_rows', 'to_scalar']


def is_timing(key: str) -> bool:
  """Whether `key` names a reading of a clock or of the machine."""
  return key.startswith(TIMING_PREFIXES)


def to_scalar(key: str, value: Any) -> int | float | str:
  """A JSON value: int, float, or 'nan', 'inf', '-inf'. float32 is written in its shortest form.

  Raises ValueError, naming the key, for anything that is not one number.
  """
  array = np.asarray(value)
  if array.size != 1 or array.dtype.kind not in 'biuf':
    raise ValueError(f'metric {key!r} must be one number, got {array.dtype}{list(array.shape)}')
  if array.dtype.kind in 'biu':
    return int(array.item())
  number = float(array.item())
  if not math.isfinite(number):
    return str(number)
  return float(str(array.reshape(())[()])) if array.dtype == np.float32 else number


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a jsonl file, without torn or foreign lines; [] where there is no file."""
  try:
    with open(path, encoding='utf-8', errors='replace') as file:
      lines = file.readlines()
  except FileNotFoundError:
    return []
  rows = []
  for line in lines:
    with contextlib.suppress(json.JSONDecodeError):
      row = json.loads(line) if line.endswith('\n') else None
      if isinstance(row, dict) and isinstance(row.get('step'), int):
        rows.append(row)
  return rows


def _encode(row: Mapping[str, Any]) -> str:
  return json.dumps(row) + '\n'


def _replace(path: str, text: str) -> None:
  temporary = f'{path}.tmp'
  with open(temporary, 'w', encoding='utf-8', newline='') as file:
    file.write(text)
  os.replace(temporary, path)


class MetricWriter:
  """Appends one row per call to the files of `workdir`, and flushes it.

  `after_step`: the step of the checkpoint that the run continues from; later rows and torn lines
  are dropped first. The default, -1, starts empty files. `enabled=False` (every process but the
  first) writes nothing. Use as a context manager, or call `close`.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    after_step: int = -1,
    tensorboard: bool = False,
    enabled: bool = True,
  ):
    self._enabled = enabled
    self._files: dict[str, io.TextIOBase] = {}
    self._tensorboard = None
    if not enabled:
      return
    os.makedirs(workdir, exist_ok=True)
    self._paths = {name: os.path.join(workdir, name) for name in (METRICS, TABLE, TIMING)}
    for name in (METRICS, TIMING):
      kept = [row for row in read_rows(self._paths[name]) if row['step'] <= after_step]
      _replace(self._paths[name], ''.join(map(_encode, kept)))
      self._files[name] = open(self._paths[name], 'a', encoding='utf-8')
    self._columns: list[str] = []
    self._rebuild_table()
    if tensorboard:
      from tensorboardX import SummaryWriter

      self._tensorboard = SummaryWriter(str(workdir), purge_step=after_step + 1)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """One row per file that has something to say; several calls per step make several rows."""
    if not self._enabled:
      return
    values = {key: to_scalar(key, scalars[key]) for key in sorted(scalars)}
    results = {key: value for key, value in values.items() if not is_timing(key)}
    readings = {key: value for key, value in values.items() if is_timing(key)}
    if results:
      self._append(METRICS, {'step': int(step), **results})
      self._append_table({'step': int(step), **results})
    if readings:
      self._append(TIMING, {'step': int(step), **readings})
    if self._tensorboard:
      for key, value in values.items():
        self._tensorboard.add_scalar(key, float(value), int(step))

  def flush(self) -> None:
    """Hands everything to the operating system (each row already is)."""
    for file in self._files.values():
      file.flush()
    if self._tensorboard:
      self._tensorboard.flush()

  def close(self) -> None:
    """Closes the files; writing again is an error."""
    for file in self._files.values():
      file.close()
    if self._tensorboard:
      self._tensorboard.close()

  def __enter__(self) -> MetricWriter:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _append(self, name: str, row: Mapping[str, Any]) -> None:
    self._files[name].write(_encode(row))
    self._files[name].flush()

  def _append_table(self, row: Mapping[str, Any]) -> None:
    if any(key not in self._columns for key in row):
      self._rebuild_table()  # the row is in metrics.jsonl already
      return
    file = self._files[TABLE]
    csv.DictWriter(file, self._columns, restval='', lineterminator='\n').writerow(row)
    file.flush()

  def _rebuild_table(self) -> None:
    """metrics.csv anew from metrics.jsonl: columns in the order of their first appearance."""
    rows = read_rows(self._paths[METRICS])
    self._columns = list(dict.fromkeys(['step', *(key for row in rows for key in row)]))
    text = io.StringIO()
    table = csv.DictWriter(text, self._columns, restval='', lineterminator='\n')
    table.writeheader()
    table.writerows(rows)
    if TABLE in self._files:
      self._files[TABLE].close()
    _replace(self._paths[TABLE], text.getvalue())
    self._files[TABLE] = open(self._paths[TABLE], 'a', encoding='utf-8', newline='')


class PhaseTimer:
  """Seconds per named phase: `with timer('rollout'): ...`, then `timer.take()`.

  A phase inside another counts in both. On an accelerator, block on the phase's results inside it.
  `watch(phase)` is a context manager around each, as `watchdog.Watchdog` is.
  """

  def __init__(self, clock=time.perf_counter, watch=contextlib.nullcontext):
    self._clock, self._watch = clock, watch
    self._seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def __call__(self, phase: str) -> Iterator[None]:
    start = self._clock()
    try:
      with self._watch(phase):
        yield
    finally:
      self._seconds[phase] = self._seconds.get(phase, 0.0) + self._clock() - start

  def take(self) -> dict[str, float]:
    """{'time/<phase>': seconds} since the last `take`, which starts again from zero."""
    taken = {f'time/{phase}': value for phase, value in self._seconds.items()}
    self._seconds = {}
    return taken
