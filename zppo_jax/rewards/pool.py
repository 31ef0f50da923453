"""A pool of spawned, killable processes for graders that may hang or eat memory.

Sympy's parser is `eval` underneath and `9**9**9` never returns: such work runs here, one call at a
time per worker, and a worker that misses its deadline is killed and replaced. Workers are plain
`python -c` children: the caller's `__main__` is not imported again, no accelerator is touched, and
a worker ends by itself when its parent goes away (end of file, or a kernel alarm while it hangs).
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

_ENTRY = (
  'import sys; from zppo_jax.rewards import pool; pool.serve(int(sys.argv[1]), int(sys.argv[2]))'
)
_HIDDEN = {
  'JAX_PLATFORMS': 'cpu',
  'CUDA_VISIBLE_DEVICES': '',
  'TPU_SKIP_MDS_QUERY': '1',
  'OMP_NUM_THREADS': '1',
  'OPENBLAS_NUM_THREADS': '1',
}
_START_S = 60.0  # to start a worker and import the call's packages; not part of the deadline
_GRACE_S = 2.0  # from SIGTERM to SIGKILL


@dataclasses.dataclass(frozen=True)
class Call:
  """`function(*args)` by reference: a module-level function; `imports` are loaded before timing."""

  function: Callable[..., Any]
  args: tuple
  imports: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of a call; `value` is None unless `reason` is 'ok'.

  Other reasons: 'timeout', 'died' (killed by the system, e.g. out of memory), 'error: ...'.
  """

  value: Any
  reason: str


@dataclasses.dataclass
class _Worker:
  process: subprocess.Popen
  pipe: connection.Connection
  calls: int = 0
  index: int | None = None  # the call it works on
  due: float = float('inf')  # monotonic seconds


class Pool:
  """Up to `num_workers` processes, started on the first `run`. Not for use by several threads."""

  def __init__(
    self,
    *,
    num_workers: int = 2,
    deadline_s: float = 5.0,
    batch_deadline_s: float = 300.0,
    recycle_after: int = 1000,
    memory_bytes: int = 4 << 30,
  ):
    """`deadline_s` per call, `batch_deadline_s` per `run`; a worker ends after `recycle_after`."""
    for name, value in (('num_workers', num_workers), ('recycle_after', recycle_after)):
      if value < 1:
        raise ValueError(f'{name} must be at least 1, got {value}')
    for name, value in (('deadline_s', deadline_s), ('batch_deadline_s', batch_deadline_s)):
      if not value > 0:
        raise ValueError(f'{name} must be positive, got {value}')
    self.num_workers = num_workers
    self.deadline_s = deadline_s
    self.batch_deadline_s = batch_deadline_s
    self.recycle_after = recycle_after
    self.memory_bytes = memory_bytes
    self._workers: list[_Worker] = []

  def run(self, calls: Sequence[Call]) -> list[Outcome]:
    """One outcome per call, in order. A missing package raises ModuleNotFoundError."""
    outcomes = [Outcome(None, 'timeout')] * len(calls)
    waiting = collections.deque(range(len(calls)))
    end = time.monotonic() + self.batch_deadline_s
    try:
      while waiting or any(w.index is not None for w in self._workers):
        if time.monotonic() > end:
          break
        self._assign(calls, waiting)
        for index, outcome in self._collect(end):
          outcomes[index] = outcome
    finally:  # also on Ctrl-C: nobody may answer into the next run
      for worker in [w for w in self._workers if w.index is not None]:
        self._drop(worker)
    return outcomes

  def close(self) -> None:
    """Ends all workers; the pool starts new ones if it is used again."""
    for worker in list(self._workers):
      self._drop(worker)

  def __enter__(self) -> Pool:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _assign(self, calls: Sequence[Call], waiting: collections.deque[int]) -> None:
    while waiting:
      worker = next((w for w in self._workers if w.index is None), None)
      if worker is None:
        if len(self._workers) >= self.num_workers:
          return
        worker = _spawn(self.memory_bytes)
        self._workers.append(worker)
      index = waiting.popleft()
      alarm_s = int(self.deadline_s + 10)
      try:
        worker.pipe.send((alarm_s, calls[index]))
      except OSError:  # it died while idle
        self._drop(worker)
        waiting.appendleft(index)
        continue
      worker.index, worker.due = index, time.monotonic() + _START_S

  def _collect(self, end: float) -> list[tuple[int, Outcome]]:
    """Waits for the next event; finished calls. Late workers are killed, old ones recycled."""
    busy = [w for w in self._workers if w.index is not None]
    pause = max(0.0, min([end] + [w.due for w in busy]) - time.monotonic())
    ready = connection.wait([w.pipe for w in busy], pause)
    finished = []
    for worker in busy:
      if worker.pipe in ready:
        outcome = self._receive(worker)
      elif time.monotonic() >= worker.due:
        outcome = Outcome(None, 'timeout')
      else:
        continue
      if outcome is None:  # the call has only begun
        continue
      finished.append((worker.index, outcome))
      worker.index, worker.calls = None, worker.calls + 1
      if outcome.reason in ('timeout', 'died') or worker.calls >= self.recycle_after:
        self._drop(worker)
    return finished

  def _receive(self, worker: _Worker) -> Outcome | None:
    try:
      kind, payload = worker.pipe.recv()
    except (EOFError, OSError):
      return Outcome(None, 'died')
    if kind == 'started':
      worker.due = time.monotonic() + self.deadline_s
      return None
    if kind == 'missing':
      raise ModuleNotFoundError(f'a verifier needs a package that is not installed: {payload}')
    return Outcome(payload, 'ok') if kind == 'ok' else Outcome(None, f'error: {payload}')

  def _drop(self, worker: _Worker) -> None:
    self._workers.remove(worker)
    worker.pipe.close()
    worker.process.terminate()
    try:
      worker.process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
      worker.process.kill()
      worker.process.wait()


def run_once(call: Call, *, deadline_s: float = 5.0) -> Outcome:
  """One call in a process of its own (about a second); a batch belongs into one `Pool`."""
  with Pool(num_workers=1, deadline_s=deadline_s) as pool:
    return pool.run([call])[0]


def _spawn(memory_bytes: int) -> _Worker:
  parent, child = connection.Pipe()
  path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
  process = subprocess.Popen(
    [sys.executable, '-c', _ENTRY, str(child.fileno()), str(memory_bytes)],
    pass_fds=(child.fileno(),),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    env=os.environ | _HIDDEN | {'PYTHONPATH': path},
  )
  child.close()
  return _Worker(process, parent)


def serve(descriptor: int, memory_bytes: int) -> None:
  """The worker's loop: receive (alarm_s, Call), send ('started', None), then the answer."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  _limit_memory(memory_bytes)
  pipe = connection.Connection(descriptor)
  while True:
    try:
      alarm_s, call = pipe.recv()
      for name in call.imports:
        importlib.import_module(name)
      pipe.send(('started', None))
      signal.signal(signal.SIGALRM, signal.SIG_DFL)  # graders may have set their own handler
      signal.alarm(alarm_s)  # the kernel ends an orphan even inside one long C call
      answer = ('ok', call.function(*call.args))
    except EOFError:
      return
    except ModuleNotFoundError as error:
      answer = ('missing', str(error))
    except (Exception, SystemExit) as error:
      answer = ('error', f'{type(error).__name__}: {error}'[:200])
    signal.alarm(0)
    pipe.send(answer)


def _limit_memory(num_bytes: int) -> None:
  import resource

  _, hard = resource.getrlimit(resource.RLIMIT_AS)
  limit = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
  resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
