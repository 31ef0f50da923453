"""ScienceWorld tasks. Needs the extra `envs-science` and Java on the PATH."""

from __future__ import annotations

from collections.abc import Sequence

from zppo_jax.core import types
from zppo_jax.envs import adapters, api


def make(name: str, variation: int, *, simplification: str = 'easy') -> api.Task:
  """A variation of a task, e.g. make('boil', 0). The package says which belong to which split."""
  args = {'name': name, 'variation': variation, 'simplification': simplification}
  return api.Task(f'scienceworld/{name}/{variation}/{simplification}', args, group=name)


class ScienceWorldEnv:
  """One task at a time, in a Java process of its own until `close`: at most one per core.

  Progress is the score, 0 where it is negative (failure); rewards are its changes. The process
  starts with the first reset and serves the next ones too.
  """

  def __init__(self, *, max_steps: int = 100):
    self._max_steps = max_steps
    self._env = None
    self._valid: tuple[str, ...] = ()
    self._progress = 0.0
    self._over = True

  def reset(self, task: api.Task, seed: int = 0) -> api.Observation:
    """Starts a task; `seed` changes nothing, for the variation fixes all. UserError: no extra."""
    scienceworld = adapters.require('scienceworld', 'envs-science')
    self._env = self._env or scienceworld.ScienceWorldEnv('', envStepLimit=self._max_steps)
    args = task.args
    self._env.load(args['name'], args['variation'], args['simplification'], generateGoldPath=True)
    text, info = self._env.reset()
    self._valid, self._progress, self._over = tuple(info['valid']), 0.0, False
    return api.Observation(f'{info["taskDesc"].strip()}\n{text.strip()}', self._valid)

  def step(self, action: str | Sequence[types.ToolCall]) -> api.StepResult:
    """Tool calls and empty texts change nothing: `info['valid']` is false."""
    command = ' '.join(action.split()) if isinstance(action, str) else ''
    if self._over or not command:
      said = 'The episode is over.' if self._over else 'Nothing happens.'
      now = api.Observation(said, self._valid)
      return api.StepResult(now, 0.0, self._over, self._progress, {'valid': False})
    text, _, done, info = self._env.step(command)
    known, self._valid = command in self._valid, tuple(info['valid'])
    before, self._progress = self._progress, max(0.0, info['score'] / 100)
    self._over = bool(done)
    now = api.Observation(text.strip(), self._valid)
    return api.StepResult(
      now, self._progress - before, self._over, self._progress, {'valid': known}
    )

  def expert(self) -> list[str]:
    """The package's solution from the start of the episode; the end may come before its last."""
    return list(self._env.get_gold_action_sequence()) if self._env else []

  def close(self) -> None:
    if self._env is not None:
      self._env.close()
    self._env, self._over = None, True
