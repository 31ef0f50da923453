"""Counts XLA compilations: a training loop must stop compiling after its warm-up."""

from __future__ import annotations

import dataclasses

_EVENT = '/jax/core/compile/backend_compile_duration'


@dataclasses.dataclass
class _Counter:
  """The process has one compiler, hence one counter, the exception to "no module-level state"."""

  installed: bool = False
  compilations: int = 0
  seconds: float = 0.0

  def listen(self, event: str, duration_s: float, **_) -> None:
    if event == _EVENT:
      self.compilations += 1
      self.seconds += duration_s


_COUNTER = _Counter()


def install() -> None:
  """Starts counting; further calls change nothing. Touches no device."""
  if _COUNTER.installed:
    return
  from jax import monitoring

  monitoring.register_event_duration_secs_listener(_COUNTER.listen)
  _COUNTER.installed = True


def count() -> int:
  """Programs compiled by the backend since `install`, loads from the persistent cache included."""
  _check()
  return _COUNTER.compilations


def seconds() -> float:
  """Seconds spent in those compilations."""
  _check()
  return _COUNTER.seconds


def _check() -> None:
  if not _COUNTER.installed:
    raise RuntimeError('call compiles.install() before reading the compile counter')
