"""Errors of means over questions. Host code, NumPy. Source: arXiv:2411.00640."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats


def standard_error(values: Sequence[float], clusters: Sequence | None = None) -> float:
  """Standard error of the mean of one value per question; NaN for fewer than two.

  s / sqrt(n). With G `clusters` (questions that share a passage, say) whose deviations sum to e_g:
  sqrt(G / (G - 1) sum_g e_g^2) / n, which is the same for clusters of one.
  """
  x = np.asarray(values, np.float64)
  groups = np.arange(len(x)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
  if len(groups) != len(x):
    raise ValueError(f'clusters: {len(groups)} for {len(x)} values')
  count = len(np.unique(groups))
  if count < 2:
    return math.nan
  sums = np.bincount(groups, weights=x - x.mean())
  return float(np.sqrt(count / (count - 1) * np.sum(sums**2)) / len(x))


def paired_error(a: Sequence[float], b: Sequence[float]) -> float:
  """Standard error of the mean difference of two systems on the same questions."""
  if len(a) != len(b):
    raise ValueError(f'a and b must be of the same questions, got {len(a)} and {len(b)}')
  return standard_error(np.asarray(a, np.float64) - np.asarray(b, np.float64))


def normal(mean: float, error: float, count: int, *, level: float = 0.95) -> tuple[float, float]:
  """mean -+ z error, with Student's t for z under 30 values; NaN where the error is."""
  tail = (1 + level) / 2
  z = stats.t.ppf(tail, count - 1) if count < 30 else stats.norm.ppf(tail)
  return mean - float(z) * error, mean + float(z) * error


def bootstrap(values: Sequence, statistic: Callable[[np.ndarray], float], rng: np.random.Generator,
              *, draws: int = 1000, level: float = 0.95) -> tuple[float, float]:
  """Percentile interval of a statistic over questions drawn with replacement."""
  if not len(values) or draws < 1 or not 0 < level < 1:
    raise ValueError('values, draws >= 1 and level in (0, 1) are needed, got '
                     f'{len(values)} values, {draws} draws, level {level}')
  x = np.asarray(values)
  found = [statistic(x[rng.integers(len(x), size=len(x))]) for _ in range(draws)]
  tail = (1 - level) / 2
  return tuple(float(q) for q in np.quantile(found, (tail, 1 - tail)))
