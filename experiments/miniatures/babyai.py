"""GRPO over episodes of BabyAI: a small student learns to walk to the thing that it is told.

A level of two things in a room of 4 x 4 (GoToLocalS6N2), seen and played in words, at most ten
actions. The student starts from a few supervised steps on plays of BabyAI's bot. It has 0.2M
parameters and words for tokens; the claim is about the machinery of episodes, not about language
models. Needs the extra `envs-grid`. Levels: https://arxiv.org/abs/1810.08272.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from experiments.miniatures import warm_grpo
from experiments.miniatures.bars import Bar, mean_error
from zppo_jax.envs.adapters import babyai

LEVEL = 'BabyAI-GoToLocalS6N2-v0'
ARM = 'GRPO after the warm start'
# Words of levels without doors are single tokens; an article goes with what follows it.
PIECES = ('Your task: go to the ', 'Your task: go to a ', 'You see ', ' steps ', ' step ', '; ',
          ', ', 'a wall ', ' box', ' ball', ' key', *babyai.ACTIONS[:-1],
          *(before + color for before in ('a ', '') for color in babyai.COLORS))


class Result(NamedTuple):
  num_seeds: int
  warm_steps: int
  steps: int
  reward: np.ndarray  # held-out mean reward [S, evaluations], first before GRPO
  succeeded: np.ndarray  # f32[S], share of the episodes of the last step that reach the goal
  expert: float  # mean reward of the bot on the held-out levels


def config(method: str, *, seed: int, steps: int, every: int) -> Any:
  """Episodes of ten actions at most."""
  c = warm_grpo.base(method, seed=seed, steps=steps, every=every)
  with c.unlocked():
    c.agent.env_args = dict(env_id=LEVEL)
  c.agent.update(env='babyai', max_turns=10, turn_tokens=4)
  c.tokenizer.pieces = PIECES
  c.rollout.update(prompt_tokens=56, max_new_tokens=256)
  c.data.update(size=2000, eval_size=256)
  return c


def expert_reward(num_levels: int) -> float:
  """Mean reward of BabyAI's bot on held-out levels."""
  from zppo_jax.envs import source

  env, total = babyai.BabyAIEnv(), 0.0
  for index in range(num_levels):
    env.reset(source.ENVS['babyai'].make(True, index, env_id=LEVEL))
    total += sum(env.step(action).reward for action in env.expert())
  env.close()
  return total / num_levels


def run(num_seeds: int = 5, *, warm_steps: int = 25, steps: int = 48, evaluations: int = 6
        ) -> Result:
  """Trains once per seed. Errors: num_seeds < 2; UserError without the extra."""
  if num_seeds < 2:
    raise ValueError(f'num_seeds must be >= 2 for standard errors, got {num_seeds}')
  expert = expert_reward(256)
  found = [warm_grpo.curve(functools.partial(config, seed=seed), warm_steps=warm_steps,
                           steps=steps, evaluations=evaluations) for seed in range(num_seeds)]
  return Result(num_seeds, warm_steps, steps, np.asarray([curve for curve, _ in found]),
                np.asarray([last['episode/succeeded'] for _, last in found]), expert)


def bars(result: Result) -> list[Bar]:
  """GRPO over episodes gains more than two standard errors."""
  gain, error = mean_error(result.reward[:, -1] - result.reward[:, 0])
  return [Bar('held-out gain of GRPO, minus two standard errors', gain - 2 * error > 0,
              gain - 2 * error, 0.0)]


def table(result: Result) -> list[str]:
  before, after = (mean_error(result.reward[:, i]) for i in (0, -1))
  return [f'{"held-out reward":24s}{"after warm start":>20s}{"after GRPO":>20s}{"bot":>8s}',
          f'{LEVEL:24s}' + ''.join(f'{m:12.3f} +- {e:.3f}' for m, e in (before, after))
          + f'{result.expert:8.3f}']


def notes(result: Result) -> list[str]:
  mean, error = mean_error(result.succeeded)
  return [f'episodes of the last step that reach the goal: {mean:.2f} +- {error:.2f}']


def record(result: Result) -> dict[str, Any]:
  return result._asdict() | dict(reward=result.reward.tolist(),
                                 succeeded=result.succeeded.tolist())


def panels(result: Result) -> dict[str, dict[str, np.ndarray]]:
  title = f'{result.steps} steps of GRPO after {result.warm_steps} of SFT'
  return {title: {ARM: result.reward}}
