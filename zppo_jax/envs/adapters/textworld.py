"""TextWorld games (files that `tw-make` writes). Needs the extra `envs-text`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from zppo_jax.core import types
from zppo_jax.envs import adapters, api

# Words for the interpreter, not for the game: they ask back, write files or take turns back.
REFUSED = frozenset({'quit', 'q', 'restart', 'restore', 'save', 'undo', 'script', 'transcript'})


def make(path: str | os.PathLike) -> api.Task:
  """The game in a file `*.z8` or `*.ulx`, its `*.json` beside it."""
  path = os.fspath(path)
  return api.Task(f'textworld/{os.path.basename(path)}', {'path': path}, group='textworld')


def command(action: str | Sequence[types.ToolCall]) -> str:
  """The action as one line for the game; '' if it is none or has a sentence for the interpreter.

  A NUL would cut the line short, and the interpreter would wait for its end for ever.
  """
  if not isinstance(action, str):
    return ''
  text = ' '.join(''.join(c if c.isprintable() else ' ' for c in action).split())
  sentences = (s.split() for s in re.split(r'[.,;]|\bthen\b', text.lower()))
  return '' if any(s and s[0] in REFUSED for s in sentences) else text


def tidy(feedback: str) -> str:
  """What the game says, without the prompt and the status line behind it."""
  return feedback.rpartition('\n>')[0].strip() or feedback.strip()


class TextWorldEnv:
  """One game at a time. Rewards are gains of the score over its maximum; progress is their sum."""

  def __init__(self):
    self._env = None
    self._state: Any = None
    self._progress = 0.0
    self._over = True

  def reset(self, task: api.Task, seed: int = 0) -> api.Observation:
    """Starts a game; `seed` changes nothing, for a game file has no chance in it.

    UserError without the extra.
    """
    textworld = adapters.require('textworld', 'envs-text')
    self.close()
    asked = textworld.EnvInfos(
      admissible_commands=True, won=True, lost=True, score=True, max_score=True,
      policy_commands=True, objective=True,
    )  # fmt: skip
    self._env = textworld.start(task.args['path'], request_infos=asked)
    self._state = self._env.reset()
    self._progress, self._over = 0.0, False
    first = self._see()  # a banner of many lines comes before the objective
    start = max(0, first.text.find(self._state.objective or ''))
    return api.Observation(first.text[start:], first.admissible)

  def step(self, action: str | Sequence[types.ToolCall]) -> api.StepResult:
    """Tool calls and commands to the interpreter change nothing: `info['valid']` is false."""
    text = command(action)
    if self._over or not text:
      said = 'The game is over.' if self._over else 'Nothing happens.'
      now = api.Observation(said, self._see().admissible)
      return api.StepResult(now, 0.0, self._over, self._progress, {'valid': False})
    self._state, _, self._over = self._env.step(text)
    before, self._progress = self._progress, self._state.score / max(1, self._state.max_score)
    info = {'valid': True, 'won': bool(self._state.won), 'lost': bool(self._state.lost)}
    return api.StepResult(
      self._see(), self._progress - before, bool(self._over), self._progress, info
    )

  def expert(self) -> list[str]:
    """Commands that win from here, as the game's own planner gives them."""
    return list(self._state.policy_commands or ()) if self._state else []

  def close(self) -> None:
    if self._env is not None:
      self._env.close()
    self._env, self._state, self._over = None, None, True

  def _see(self) -> api.Observation:
    if self._state is None:
      return api.Observation('', ())
    return api.Observation(tidy(self._state.feedback), tuple(self._state.admissible_commands or ()))
