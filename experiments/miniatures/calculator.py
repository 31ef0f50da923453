"""GRPO over several turns: a small student learns to multiply with a calculator, and without.

Both arms start from the same number of supervised steps on worked traces (with a tool call and its
answer, or all in the head), then get GRPO on the same questions at equal rollouts. Tool answers are
not trained on. The student has 0.2M parameters and characters for tokens; the claim is about the
machinery of episodes, not about language models.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from experiments.miniatures import warm_grpo
from experiments.miniatures.bars import Bar, mean_error

ARMS = {'with the calculator': True, 'without': False}


class Result(NamedTuple):
  num_seeds: int
  warm_steps: int
  steps: int
  accuracy: dict[str, np.ndarray]  # arm -> held-out accuracy [S, evaluations], first before GRPO
  tool_calls: np.ndarray  # f32[S], calls per episode at the end


def config(method: str, *, tool: bool, seed: int, steps: int, every: int) -> Any:
  """Products of two numbers of two digits."""
  c = warm_grpo.base(method, seed=seed, steps=steps, every=every)
  with c.unlocked():
    c.data.tasks = dict(products=dict(name='arithmetic', digits=2, terms=2, operators='*',
                                      tool=tool, weight=1.0))
  c.agent.update(tools=('calculator',) if tool else (), turn_tokens=32 if tool else 0)
  c.rollout.max_new_tokens = 72 if tool else 40
  return c


def run(num_seeds: int = 5, *, warm_steps: int = 70, steps: int = 80, evaluations: int = 8
        ) -> Result:
  """Trains both arms for every seed. Errors: num_seeds < 2."""
  if num_seeds < 2:
    raise ValueError(f'num_seeds must be >= 2 for standard errors, got {num_seeds}')
  curves: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
  calls = []
  for seed in range(num_seeds):
    for arm, tool in ARMS.items():
      found, last = warm_grpo.curve(functools.partial(config, tool=tool, seed=seed),
                                    warm_steps=warm_steps, steps=steps, evaluations=evaluations)
      curves[arm].append(found)
      if tool:
        calls.append(last['episode/tool_calls'])
  return Result(num_seeds, warm_steps, steps, {a: np.asarray(x) for a, x in curves.items()},
                np.asarray(calls))


def bars(result: Result) -> list[Bar]:
  """GRPO over episodes gains more than two standard errors, and ends above the other arm."""
  curves = result.accuracy['with the calculator']
  gain, error = mean_error(curves[:, -1] - curves[:, 0])
  between, between_error = mean_error(curves[:, -1] - result.accuracy['without'][:, -1])
  return [Bar('held-out gain of GRPO with the calculator, minus two standard errors',
              gain - 2 * error > 0, gain - 2 * error, 0.0),
          Bar('held-out accuracy with the calculator minus without, minus two standard errors',
              between - 2 * between_error > 0, between - 2 * between_error, 0.0)]


def table(result: Result) -> list[str]:
  lines = [f'{"held-out accuracy":24s}{"after warm start":>20s}{"after GRPO":>20s}']
  for arm, curves in result.accuracy.items():
    before, after = (mean_error(curves[:, i]) for i in (0, -1))
    lines.append(f'{arm:24s}' + ''.join(f'{m:12.3f} +- {e:.3f}' for m, e in (before, after)))
  return lines


def notes(result: Result) -> list[str]:
  mean, error = mean_error(result.tool_calls)
  return [f'calls per episode in the last step: {mean:.2f} +- {error:.2f}']


def record(result: Result) -> dict[str, Any]:
  return result._asdict() | dict(accuracy={a: x.tolist() for a, x in result.accuracy.items()},
                                 tool_calls=result.tool_calls.tolist())


def panels(result: Result) -> dict[str, dict[str, np.ndarray]]:
  return {f'{result.steps} steps of GRPO after {result.warm_steps} of SFT': result.accuracy}
