"""Many environments at once, each in a thread of its own, each step under a deadline.

Python cannot stop a thread. One that hangs is left behind (a daemon: it does not keep the process
alive), its environment with it, and a fresh environment takes the place; should the call return
after all, the environment is closed and the thread ends. An environment lives and dies in its
thread, as sqlite connections and the like want it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures

from zppo_jax.core import errors, types
from zppo_jax.envs import api

Action = str | Sequence[types.ToolCall]
_CLOSE_S = 2.0  # for all environments together to close


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of one call: a value, or `error` 'timeout' or 'error: ...' and None."""

  value: api.Observation | api.StepResult | None
  error: str = ''


class VectorEnv:
  """`size` environments of one factory, called together. Not for use by several threads."""

  def __init__(
    self,
    factory: Callable[[], api.TextEnv],
    size: int,
    deadline_s: float,
    *,
    reset_s: float = 60.0,
  ):
    """Seconds count from the call, in which all run side by side; `reset_s` includes building."""
    if size < 1:
      raise ValueError(f'size must be at least 1, got {size}')
    for name, value in (('deadline_s', deadline_s), ('reset_s', reset_s)):
      if not 0 < value <= threading.TIMEOUT_MAX:
        raise ValueError(f'{name} must be positive and at most {threading.TIMEOUT_MAX:.0f}, '
                         f'got {value}')
    self.factory = factory
    self.deadline_s = deadline_s
    self.reset_s = reset_s
    self._workers: list[_Worker | None] = [None] * size  # None = no episode there, nothing built

  def reset(self, tasks: Sequence[api.Task | None], seeds: Sequence[int]) -> list[Outcome | None]:
    """Starts an episode in each environment, in order; None leaves one alone and gives None.

    ValueError: another number of tasks or seeds than of environments.
    """
    self._check(tasks)
    self._check(seeds)
    calls = {i: ('reset', tasks[i], seeds[i]) for i in range(len(tasks)) if tasks[i] is not None}
    for i in calls:
      self._workers[i] = self._workers[i] or _Worker(self.factory)
    return self._run(calls, self.reset_s)

  def step(self, actions: Sequence[Action | None]) -> list[Outcome | None]:
    """One action for each environment, in order; None leaves one alone and gives None.

    After an error the environment takes part again once it is reset. ValueError: an action for an
    environment that has no episode, or another number of actions than of environments.
    """
    self._check(actions)
    calls = {i: ('step', action) for i, action in enumerate(actions) if action is not None}
    lost = [i for i in calls if self._workers[i] is None]
    if lost:
      raise ValueError(f'environments {lost} have no episode: reset them first')
    return self._run(calls, self.deadline_s)

  def close(self) -> None:
    """Closes all environments; one that does not answer is left behind. Resetting starts anew."""
    workers = [worker for worker in self._workers if worker]
    self._workers = [None] * len(self._workers)
    for worker in workers:
      worker.retire()
    end = time.monotonic() + _CLOSE_S
    for worker in workers:
      worker.thread.join(max(0.0, end - time.monotonic()))

  def __enter__(self) -> VectorEnv:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _check(self, values: Sequence) -> None:
    if len(values) != len(self._workers):
      raise ValueError(f'need one value per environment, {len(self._workers)}, got {len(values)}')

  def _run(self, calls: dict[int, tuple], deadline_s: float) -> list[Outcome | None]:
    outcomes: list[Outcome | None] = [None] * len(self._workers)
    answers = {i: self._workers[i].call(*call) for i, call in calls.items()}
    try:
      futures.wait(answers.values(), deadline_s)
    finally:  # also on Ctrl-C: an environment whose answer nobody read is in an unknown state
      for i, answer in answers.items():
        outcomes[i] = _outcome(answer)
        if outcomes[i].error:
          self._workers[i].retire()
          self._workers[i] = None
    return outcomes


def _outcome(answer: futures.Future) -> Outcome:
  if not answer.done():
    return Outcome(None, 'timeout')
  error = answer.exception()
  if error is None:
    return Outcome(answer.result())
  return Outcome(None, f'error: {errors.brief(error)}'[:500])


class _Worker:
  """A thread and the environment that lives in it."""

  def __init__(self, factory: Callable[[], api.TextEnv]):
    self._inbox: queue.SimpleQueue = queue.SimpleQueue()
    self.thread = threading.Thread(target=_serve, args=(factory, self._inbox), daemon=True)
    self.thread.start()

  def call(self, method: str, *args) -> futures.Future:
    answer: futures.Future = futures.Future()
    self._inbox.put((answer, method, args))
    return answer

  def retire(self) -> None:
    self._inbox.put(None)


def _serve(factory: Callable[[], api.TextEnv], inbox: queue.SimpleQueue) -> None:
  env = None
  while (request := inbox.get()) is not None:
    answer, method, args = request
    try:
      env = factory() if env is None else env
      answer.set_result(getattr(env, method)(*args))
    except BaseException as error:  # SystemExit too: it would end the thread without an answer
      answer.set_exception(error)
  if env is not None:
    with contextlib.suppress(Exception):
      env.close()
