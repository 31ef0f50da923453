"""M1: ZPPO against its own switches on a log-linear student, in a minute on two CPU cores.

Runs the arms over paired seeds, states the pass bars and what is not claimed.
Source: arXiv:2606.18216; the task is ours.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.miniatures.bars import Bar, mean_error
from experiments.miniatures.zppo_student import ARMS, TASK, Task, Trained, make_world, train_seeds


class Result(NamedTuple):
  """Paired runs: seed s has the same task, data order and noise in every arm."""

  num_seeds: int
  steps: int
  arms: dict[str, Trained]  # numpy fields, [S, ...]


def run(num_seeds: int = 8, steps: int = 120, *, arms: Sequence[str] = tuple(ARMS),
        task: Task = TASK) -> Result:
  """Trains the arms, two at a time (a compilation holds one core). Errors: num_seeds < 2."""
  if num_seeds < 2:
    raise ValueError(f'num_seeds must be >= 2 for standard errors, got {num_seeds}')
  keys = jax.vmap(jax.random.key)(np.arange(num_seeds))

  def train_config(config):  # arms that share a program follow each other in one thread
    found = {}
    for name in (name for name in arms if ARMS[name][0] == config):
      made = [make_world(seed, task, ARMS[name][1]) for seed in range(num_seeds)]
      worlds = jax.tree.map(lambda *x: np.stack(x), *made)
      found[name] = jax.device_get(
        train_seeds(keys, *worlds, config=config, task=task, steps=steps))
    return found

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    parts = list(pool.map(train_config, dict.fromkeys(ARMS[name][0] for name in arms)))
  done = {name: trained for part in parts for name, trained in part.items()}
  return Result(num_seeds, steps, {name: done[name] for name in arms})


def gain(result: Result, arm: str, other: str) -> tuple[float, float]:
  """AUC of arm minus other: mean and paired standard error."""
  return mean_error(result.arms[arm].auc - result.arms[other].auc)


def bars(result: Result) -> list[Bar]:
  """The pass bars (a) to (c); they are stated for 5 seeds or more."""
  found = []
  for arm, other, errors in (('zppo', 'grpo_buffer', 3), ('zppo', 'grpo_buffer_matched', 3),
                             ('reach_1', 'reach_0', 2)):
    mean, error = gain(result, arm, other)
    letter = 'a' if arm == 'zppo' else 'c'
    found.append(Bar(f'({letter}) AUC, {arm} minus {other}, against {errors} paired s.e.',
                     mean > errors * error, mean, errors * error))
  rise = np.min(result.arms['zppo'].graduation() - result.arms['grpo_buffer'].graduation())
  found.insert(2, Bar('(b) graduation of 0 %-entries, zppo minus grpo_buffer, lowest seed',
                      bool(rise > 0), float(rise), 0.0))
  return found


def table(result: Result) -> list[str]:
  """One line per arm: AUC, paired gain of ZPPO, graduation by both denominators, samples."""
  row = '{:<20} {:>14} {:>6} {:>16} {:>9} {:>7} {:>9} {:>8}'.format
  pair = lambda x: '{:.3f} +- {:.3f}'.format(*x)
  share = lambda x: '-' if np.isnan(x).any() else f'{x.mean():.1%}'
  lines = [row('', '', '', '', '0% grad.', '0% grad.', 'student', 'teacher'),
           row('arm', 'AUC', 'last', 'zppo minus it', '/admitted', '/left', 'rollouts', 'samples')]
  for name, arm in result.arms.items():
    lines.append(row(
      name, pair(mean_error(arm.auc)), f'{arm.curve[:, -1].mean():.3f}',
      '-' if name == 'zppo' else pair(gain(result, 'zppo', name)), share(arm.graduation()),
      share(arm.graduation('left')), f'{arm.rollouts.mean():.0f}',
      f'{arm.teacher_samples.mean():.0f}'))
  return lines


def notes(result: Result) -> list[str]:
  """What M1 does not claim: figures without a bar."""
  pairs = (('super-additivity', 'zppo', 'grpo_both'), ('harm of with_zero', 'with_zero', 'zppo'),
           ('norm none', 'none', 'zppo'), ('BCQ without NCQ', 'bcq', 'zppo'),
           ('NCQ without BCQ', 'ncq', 'zppo'))
  show = lambda claim, arm, other: '{}: AUC, {} minus {} {:+.3f} +- {:.3f}'.format(
    claim, arm, other, *gain(result, arm, other))
  return [show(*pair) for pair in pairs]


def record(result: Result) -> dict[str, Any]:
  """JSON values: protocol and every figure per seed."""
  arms = {name: dict(
    config=dataclasses.asdict(ARMS[name][0]), reach=ARMS[name][1], auc=arm.auc.tolist(),
    rollouts=arm.rollouts.tolist(), teacher_samples=arm.teacher_samples.tolist(),
    graduation={of: None if np.isnan(arm.graduation(of)).any() else arm.graduation(of).tolist()
                for of in ('admitted', 'left')},
    buffer={k: getattr(arm.buffer, k).tolist() for k in ('admitted', 'graduated', 'evicted')},
    curve=arm.curve.tolist()) for name, arm in result.arms.items()}
  return dict(task=dataclasses.asdict(TASK), num_seeds=result.num_seeds, steps=result.steps,
              arms=arms)


def panels(result: Result) -> dict[str, dict[str, np.ndarray]]:
  """Learning curves f32[S, steps + 1] by panel and arm."""
  arms = {name: arm.curve for name, arm in result.arms.items()}
  reaches = [name for name in arms if name.startswith('reach_')]
  return {'ZPPO and its switches': {k: v for k, v in arms.items() if k not in reaches},
          'ZPPO by teacher reach': {k: arms[k] for k in reaches}}
