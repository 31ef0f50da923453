"""Copies of environments that cannot be copied: the same actions in a fresh one, and a check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from zppo_jax.core import types
from zppo_jax.envs import api

Action = str | Sequence[types.ToolCall]


class ReplayError(RuntimeError):
  """An environment that says something else when it is played again: it is not deterministic."""


def replay(
  factory: Callable[[], api.TextEnv],
  task: api.Task,
  seed: int,
  actions: Sequence[Action],
  *,
  texts: Sequence[str] | None = None,
) -> api.TextEnv:
  """A fresh environment after `actions`, checked against what was recorded.

  `texts` are the recorded observations: that of the reset, then one per action; None checks
  nothing. ReplayError at the first text that differs; ValueError for another number of texts.
  """
  if texts is not None and len(texts) != len(actions) + 1:
    raise ValueError(f'texts must be {len(actions) + 1}, one more than actions, got {len(texts)}')
  env = factory()
  try:
    _compare(0, texts, env.reset(task, seed))
    for number, action in enumerate(actions, 1):
      _compare(number, texts, env.step(action).observation)
  except BaseException:
    env.close()
    raise
  return env


def _compare(number: int, texts: Sequence[str] | None, seen: api.Observation) -> None:
  if texts is not None and texts[number] != seen.text:
    where = f'action {number}' if number else 'the reset'
    raise ReplayError(f'after {where} it was {texts[number]!r}, now it is {seen.text!r}')


class ReplayedEnv:
  """Gives any deterministic environment `clone`, at the price of its episode played again."""

  def __init__(self, factory: Callable[[], api.TextEnv]):
    self._factory = factory
    self._env = factory()
    self._start: tuple[api.Task, int] | None = None
    self._actions: tuple[Action, ...] = ()
    self._texts: tuple[str, ...] = ()

  def reset(self, task: api.Task, seed: int) -> api.Observation:
    observation = self._env.reset(task, seed)
    self._start, self._actions, self._texts = (task, seed), (), (observation.text,)
    return observation

  def step(self, action: Action) -> api.StepResult:
    result = self._env.step(action)
    self._actions += (action,)
    self._texts += (result.observation.text,)
    return result

  def clone(self) -> ReplayedEnv:
    """A second environment in the same state. ReplayError if it comes out different."""
    twin = copy.copy(self)
    if self._start is None:
      twin._env = self._factory()
    else:
      twin._env = replay(self._factory, *self._start, self._actions, texts=self._texts)
    return twin

  def close(self) -> None:
    self._env.close()
