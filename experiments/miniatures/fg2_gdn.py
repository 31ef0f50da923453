"""FG2-GDN and FG2-GDN+ against KDA and GDN at equal state: erasing without writing, and recall.

Source: arXiv 2604.19021, whose 1.3B ablation has the same pattern; the tasks are ours.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.miniatures import fg2_tasks as tasks
from experiments.miniatures.bars import Bar, mean_error

STREAM, RECALL = tasks.Stream(), tasks.Recall()


class Result(NamedTuple):
  num_seeds: int
  stream_task: tasks.Stream
  recall_task: tasks.Recall
  stream: dict[str, np.ndarray]  # arm -> error [S, steps]
  recall: dict[str, np.ndarray]  # arm -> accuracy [S, steps]


def run(num_seeds: int = 3, *, stream: tasks.Stream = STREAM,
        recall: tasks.Recall = RECALL) -> Result:
  """Trains every arm on both tasks. Errors: num_seeds < 2."""
  if num_seeds < 2:
    raise ValueError(f'num_seeds must be >= 2 for standard errors, got {num_seeds}')
  keys = jax.vmap(jax.random.key)(np.arange(num_seeds))
  return Result(
    num_seeds, stream, recall,
    {a: np.asarray(tasks.train(keys, arm=a, task=stream)) for a in tasks.STREAM_ARMS},
    {a: np.asarray(tasks.train(keys, arm=a, task=recall)) for a in tasks.RECALL_ARMS})


def final(curves: np.ndarray) -> np.ndarray:
  """Mean over the last twentieth of the steps, per seed: batches are fresh, so it is held out."""
  return curves[:, -max(curves.shape[1] // 20, 1):].mean(1)


def _bar(name: str, figure: float, threshold: float) -> Bar:
  return Bar(name, bool(figure > threshold), float(figure), threshold)


def bars(result: Result) -> list[Bar]:
  """The bars of the specification."""
  error = {a: final(x).mean() for a, x in result.stream.items()}
  right = {a: final(x).mean() for a, x in result.recall.items()}
  return [
    _bar('erase: 1 - error of FG2-GDN+ over KDA', 1 - error['fg2_gdn_plus'] / error['kda'], 0.6),
    _bar('erase: 1 - error of decoupled scalars over KDA',
         1 - error['scalar_decoupled'] / error['kda'], 0.6),
    _bar('erase: 0.15 - relative distance of FG2-GDN to KDA',
         0.15 - abs(error['fg2_gdn'] / error['kda'] - 1), 0.),
    _bar('recall: accuracy of FG2-GDN+ minus GDN', right['fg2_gdn_plus'] - right['gdn'], 0.08),
    _bar('recall: accuracy of FG2-GDN+ minus KDA', right['fg2_gdn_plus'] - right['kda'], -0.03)]


def table(result: Result) -> list[str]:
  """One line per task and arm: mean and standard error over seeds."""
  lines = []
  for title, arms in (('erase, squared error', result.stream),
                      ('recall, accuracy', result.recall)):
    for arm, curves in arms.items():
      x = final(curves)
      mean, error = mean_error(x)
      seeds = ' '.join(f'{v:.3f}' for v in x)
      lines.append(f'{title:22s} {arm:18s} {mean:.4f} +- {error:.4f}   {seeds}')
  return lines


def notes(result: Result) -> list[str]:
  """Figures without a bar."""
  right = {a: final(x).mean() for a, x in result.recall.items()}
  return [f'recall: FG2-GDN (one vector for both sides) minus KDA '
          f'{right["fg2_gdn"] - right["kda"]:+.3f}; no bar, the paper has it below KDA too',
          f'recall: chance is {1 / result.recall_task.alphabet:.3f}']


def record(result: Result) -> dict[str, Any]:
  """JSON values: protocol and final figures per seed."""
  return dict(num_seeds=result.num_seeds, stream_task=dataclasses.asdict(result.stream_task),
              recall_task=dataclasses.asdict(result.recall_task),
              stream={a: final(x).tolist() for a, x in result.stream.items()},
              recall={a: final(x).tolist() for a, x in result.recall.items()})


def panels(result: Result) -> dict[str, dict[str, np.ndarray]]:
  """Smoothed curves [S, points] by panel and arm."""
  def smooth(x):
    width = max(x.shape[1] // 50, 1)
    return x[:, :x.shape[1] // width * width].reshape(len(x), -1, width).mean(2)

  return {'squared error, erasing without writing': {a: smooth(x)
                                                     for a, x in result.stream.items()},
          'accuracy, recall with overwrites': {a: smooth(x) for a, x in result.recall.items()}}
