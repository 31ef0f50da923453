"""Tasks of environments as questions: the first observation asks, the expert's play is the worked
dialogue."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from zppo_jax.core.types import Example, Message
from zppo_jax.envs import api, household, shop
from zppo_jax.envs.adapters import babyai


@dataclasses.dataclass(frozen=True)
class Env:
  """`factory()` makes an environment with an `expert()`, `make(held_out, index, **args)` a task."""

  factory: Callable[[], Any]
  make: Callable[..., api.Task]


def _split(make: Callable[..., api.Task]) -> Callable[..., api.Task]:
  return lambda held_out, index, **args: make('heldout' if held_out else 'train', index, **args)


def _level(held_out: bool, index: int, *, env_id: str = 'BabyAI-GoToObj-v0') -> api.Task:
  return babyai.make(env_id, 2 * index + held_out)


ENVS = {'household': Env(household.HouseholdEnv, _split(household.make)),
        'shop': Env(shop.ShopEnv, _split(shop.make)),
        'babyai': Env(babyai.BabyAIEnv, _level)}  # needs the extra envs-grid


@dataclasses.dataclass(frozen=True)
class EnvSource:
  """`size` tasks of the environment `env`; `args` are those of its `make`."""

  env: str
  split: str
  size: int
  args: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < self.size:
      raise IndexError(f'row {index} is outside [0, {self.size})')
    own = ENVS[self.env]
    task = own.make(self.split != 'train', index, **self.args)
    env = own.factory()
    try:
      said = [Message('user', env.reset(task, 0).text)]
      for action in env.expert():
        said += [Message('assistant', action), Message('user', env.step(action).observation.text)]
    finally:
      env.close()
    return Example(uid=task.uid, messages=(said[0],), answer='', verifier='env', meta=task.args,
                   solution='\n'.join(m.content for m in said[1::2]), dialogue=tuple(said[1:-1]))
