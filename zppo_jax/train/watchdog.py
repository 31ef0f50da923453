"""A time limit on every phase of a run, so that a hang ends with the name of what hung."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal as signals
import sys
import threading
import time
from collections.abc import Callable, Iterator

from zppo_jax.core.errors import UserError

HUNG = 43  # exit status of a process whose phase could not be interrupted


class Watchdog:
  """`with watchdog('reward'): ...` raises UserError once the phase lasts longer than `limit_s`.

  Python code is interrupted where it stands. A wait inside a compiled program or a collective is
  not: `grace_s` later the stacks of all threads go to stderr and the process ends with status 43,
  to be started again from its newest checkpoint. Phases nest, each with its own limit. 0 s = no
  limit. Only the main thread is watched: elsewhere nothing could be interrupted.
  """

  def __init__(self, limit_s: float, *, grace_s: float = 30.0,
               kill: Callable[[int], None] = os._exit):
    self._limit, self._grace, self._kill = limit_s, grace_s, kill
    self._phases: list[tuple[str, float]] = []  # (name, when it is over), outer ones first
    self._change = threading.Condition()
    self._open = False  # whether a thread watches
    self._overdue: tuple[str, float] | None = None  # the phase that a signal is under way for
    self._old = None

  def __enter__(self) -> Watchdog:
    main = threading.current_thread() is threading.main_thread()
    if self._limit and main:
      self._old = signals.signal(signals.SIGALRM, self._interrupt)
      self._open = True
      threading.Thread(target=self._watch, name='watchdog', daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    with self._change:
      watched, self._open = self._open, False
      self._change.notify()
    if watched:
      signals.signal(signals.SIGALRM, self._old)

  @contextlib.contextmanager
  def __call__(self, phase: str) -> Iterator[None]:
    """Watches what runs inside; raises UserError, naming the phase and the limit."""
    outer = self._phases
    self._set([*outer, (phase, time.monotonic() + self._limit)])
    try:
      yield
    finally:
      self._phases = outer  # first, and without a lock: the signal may interrupt what follows
      self._set(outer)

  def _set(self, phases: list[tuple[str, float]]) -> None:
    with self._change:
      self._phases = phases
      self._change.notify()

  def _interrupt(self, *_) -> None:
    if self._overdue in self._phases:  # it may have ended meanwhile
      # Here the phase ends: the signal may have come where it would just have been taken off.
      self._phases = self._phases[:self._phases.index(self._overdue)]
      raise UserError(self._message())

  def _is_over(self) -> bool:
    return not self._open or self._overdue not in self._phases

  def _message(self) -> str:
    return f'phase {self._overdue[0]!r} took longer than log.phase_limit_s = {self._limit:g}'

  def _watch(self) -> None:
    with self._change:
      while self._open:
        first = min(self._phases, key=lambda p: p[1], default=None)
        wait = None if first is None else first[1] - time.monotonic()
        if wait is None or wait > 0:
          self._change.wait(wait)
          continue
        self._overdue = first
        signals.pthread_kill(threading.main_thread().ident, signals.SIGALRM)
        self._change.wait_for(self._is_over, self._grace)
        if not self._is_over():
          print(f'{self._message()} and cannot be interrupted', file=sys.stderr, flush=True)
          faulthandler.dump_traceback(all_threads=True)
          self._kill(HUNG)
          return
