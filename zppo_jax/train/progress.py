"""Progress of a run: a bar where one can be drawn, else one line per logging interval."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

SHOWN = {
  'reward': ('reward/mean', 'reward'),
  'accuracy': ('eval/accuracy', 'accuracy'),
  'loss': ('loss', 'loss/policy'),
  'tokens/s': ('tokens_per_s',),
}


def is_interactive(stream: TextIO) -> bool:
  """Whether `stream` is a terminal, or this process a notebook's kernel."""
  return 'ipykernel' in sys.modules or bool(getattr(stream, 'isatty', bool)())


def format_seconds(seconds: float) -> str:
  """`45s`, `3m20s` or `2h05m`."""
  whole = max(0, round(seconds))
  if whole < 60:
    return f'{whole}s'
  if whole < 3600:
    return f'{whole // 60}m{whole % 60:02d}s'
  return f'{whole // 3600}h{whole % 3600 // 60:02d}m'


def _format_value(value: Any) -> str:
  number = float(value)
  return f'{number:,.0f}' if abs(number) >= 1000 else f'{number:.4g}'


class Progress:
  """`update(step, metrics)` after each step; a value that is missing keeps its last reading.

  `shown` maps a label to the metric keys that may carry it, first match wins. The time left is
  extrapolated from the second step on, since the first one compiles.
  """

  def __init__(
    self,
    total_steps: int,
    *,
    start_step: int = 0,
    every: int = 1,
    shown: Mapping[str, tuple[str, ...]] | None = None,
    stream: TextIO | None = None,
    interactive: bool | None = None,
    enabled: bool = True,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._total, self._step, self._every = total_steps, start_step, max(1, every)
    self._shown = dict(SHOWN if shown is None else shown)
    self._stream = sys.stderr if stream is None else stream
    self._enabled, self._clock = enabled, clock
    self._first: tuple[int, float] | None = None  # step and time of the first update
    self._values: dict[str, str] = {}
    self._bar = None
    if enabled and (is_interactive(self._stream) if interactive is None else interactive):
      from tqdm.auto import tqdm

      self._bar = tqdm(total=total_steps, initial=start_step, file=self._stream, unit='step')

  def update(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Reports that `step` (counted from 1) is done; prints each `every` steps and at the end."""
    if not self._enabled:
      return
    now = self._clock()
    self._first = self._first or (step, now)
    for label, keys in self._shown.items():
      key = next((key for key in keys if key in metrics), None)
      if key is not None:
        self._values[label] = _format_value(metrics[key])
    if self._bar is not None:
      self._bar.set_postfix(self._values, refresh=False)
      self._bar.update(step - self._step)
    elif step % self._every == 0 or step >= self._total:
      print(self._line(step, now), file=self._stream, flush=True)
    self._step = step

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _line(self, step: int, now: float) -> str:
    parts = [f'step {step}/{self._total}']
    parts += [f'{label} {value}' for label, value in self._values.items()]
    first_step, first_time = self._first
    if step > first_step and step < self._total:
      left = (now - first_time) / (step - first_step) * (self._total - step)
      parts.append(f'ETA {format_seconds(left)}')
    return '  '.join(parts)
