"""BabyAI and MiniGrid levels, seen and played in words. Needs the extra `envs-grid`.

The agent stands at column 3, row 6 of its 7 x 7 view and looks along falling rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from zppo_jax.core import types
from zppo_jax.envs import adapters, api

ACTIONS = ('left', 'right', 'forward', 'pickup', 'drop', 'toggle', 'done')  # by MiniGrid's numbers
OBJECTS = (
  'unseen', 'empty', 'wall', 'floor', 'door', 'key', 'ball', 'box', 'goal', 'lava', 'agent',
)  # fmt: skip
COLORS = ('red', 'green', 'blue', 'purple', 'yellow', 'grey')
DOORS = ('open', 'closed', 'locked')
_COLUMN, _ROW = 3, 6
_BACKGROUND = ('unseen', 'empty', 'floor', 'wall')
_SIDES = {'forward': (0, -1), 'left': (-1, 0), 'right': (1, 0)}


def make(env_id: str, seed: int) -> api.Task:
  """The level that MiniGrid draws from a seed, e.g. make('BabyAI-GoToObj-v0', 0)."""
  return api.Task(f'{env_id}/{seed}', {'env_id': env_id, 'seed': seed}, group=env_id)


def describe(image: Any) -> str:
  """The view u8[7, 7, 3] (object, colour, state) in words, near things first, then the walls."""
  seen = []
  for x in range(7):
    for y in range(7):
      name = _name(image[x][y])
      if OBJECTS[image[x][y][0]] not in _BACKGROUND and (x, y) != (_COLUMN, _ROW):
        forward, right = _ROW - y, x - _COLUMN
        seen.append((forward + abs(right), forward, right, name))
  lines = [f'{_article(name)} {_way(f, r)}' for _, f, r, name in sorted(seen)]
  lines += [f'a wall {_steps(n, side)}' for side in _SIDES if (n := _wall(image, side))]
  text = f'You see {"; ".join(lines)}.' if lines else 'You see nothing.'
  carried = image[_COLUMN][_ROW]  # MiniGrid draws what the agent carries where it stands
  if OBJECTS[carried[0]] in _BACKGROUND:
    return text
  return f'{text} You carry {_article(_name(carried))}.'


def _name(cell: Sequence[int]) -> str:
  kind, color = OBJECTS[cell[0]], COLORS[cell[1]]
  return f'{DOORS[cell[2]]} {color} door' if kind == 'door' else f'{color} {kind}'


def _article(name: str) -> str:
  return f'an {name}' if name[0] == 'o' else f'a {name}'


def _steps(count: int, side: str) -> str:
  return f'{count} {"step" if count == 1 else "steps"} {side}'


def _way(forward: int, right: int) -> str:
  ways = [_steps(forward, 'forward')] if forward else []
  if right:
    ways.append(_steps(abs(right), 'right' if right > 0 else 'left'))
  return ', '.join(ways)


def _wall(image: Any, side: str) -> int:
  """Steps to the nearest wall straight to one side, 0 if none is in view."""
  dx, dy = _SIDES[side]
  for count in range(1, 7):
    x, y = _COLUMN + count * dx, _ROW + count * dy
    if not (0 <= x < 7 and 0 <= y < 7):
      break
    if OBJECTS[image[x][y][0]] == 'wall':
      return count
  return 0


class BabyAIEnv:
  """One level at a time. Reward 1 - 0.9 * steps / limit at success; the level limits the steps."""

  def __init__(self):
    self._env = None
    self._view: dict[str, Any] = {}
    self._over = True

  def reset(self, task: api.Task, seed: int = 0) -> api.Observation:
    """Starts the level of a task; `seed` changes nothing, for the task has its own.

    UserError without the extra.
    """
    gymnasium = adapters.require('gymnasium', 'envs-grid')
    adapters.require('minigrid', 'envs-grid')
    self.close()
    self._env = gymnasium.make(task.args['env_id'], disable_env_checker=True)
    self._view, _ = self._env.reset(seed=task.args['seed'])
    self._over = False
    return self._see(f'Your task: {self._view["mission"]}.\n')

  def step(self, action: str | Sequence[types.ToolCall]) -> api.StepResult:
    """Unknown words cost no step: `info['valid']` is false."""
    name = action.strip().lower() if isinstance(action, str) else ''
    if self._over or name not in ACTIONS:
      said = 'The episode is over.\n' if self._over else 'Nothing happens.\n'
      return api.StepResult(self._see(said), 0.0, self._over, None, {'valid': False})
    self._view, reward, won, late, _ = self._env.step(ACTIONS.index(name))
    self._over = bool(won or late)
    return api.StepResult(self._see(''), float(reward), self._over, None, {'valid': True})

  def clone(self) -> BabyAIEnv:
    return copy.deepcopy(self)

  def expert(self) -> list[str]:
    """What BabyAI's bot does from here to the end; it solves all but a few bonus levels."""
    bots = adapters.require('minigrid.utils.baby_ai_bot', 'envs-grid')
    twin, plan = self.clone(), []
    bot = bots.BabyAIBot(twin._env)
    while not twin._over:
      plan.append(ACTIONS[bot.replan()])
      twin.step(plan[-1])
    return plan

  def close(self) -> None:
    if self._env is not None:
      self._env.close()
    self._env, self._over = None, True

  def _see(self, said: str) -> api.Observation:
    text = describe(self._view['image'].tolist()) if self._view else ''
    return api.Observation(f'{said}{text}', ACTIONS)
