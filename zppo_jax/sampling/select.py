"""Choosing among samples of one question, and what k of n samples are worth. Host code, NumPy.

Dims: n samples of a question, c of them right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np


def pass_at_k(n: int, c: int, k: int) -> float:
  """1 - C(n - c, k) / C(n, k): chance that k of the n samples hold a right one; NaN if n < k.

  Unbiased. Raises ValueError unless 0 <= c <= n and k >= 1. Source: arXiv:2107.03374.
  """
  _check(n, c, k)
  return math.nan if n < k else 1 - math.comb(n - c, k) / math.comb(n, k)


def all_at_k(n: int, c: int, k: int) -> float:
  """C(c, k) / C(n, k): chance that k of the n samples are all right; NaN if n < k."""
  _check(n, c, k)
  return math.nan if n < k else math.comb(c, k) / math.comb(n, k)


def _check(n: int, c: int, k: int) -> None:
  if not 0 <= c <= n:
    raise ValueError(f'c must lie in 0..n = {n}, got {c}')
  if k < 1:
    raise ValueError(f'k must be at least 1, got {k}')


def clusters(answers: Sequence[Hashable | None],
             same: Callable[[Hashable, Hashable], bool] | None = None) -> list[int]:
  """Number of the cluster of each answer, in order of appearance; -1 for an answer of None.

  `same` compares with the first answer of a cluster, by default by equality.
  """
  first: list[Hashable] = []
  found = []
  for answer in answers:
    if answer is None:
      found.append(-1)
      continue
    at = next((i for i, x in enumerate(first) if (x == answer if same is None else
                                                  same(x, answer))), len(first))
    if at == len(first):
      first.append(answer)
    found.append(at)
  return found


def vote(groups: Sequence[int], weights: Sequence[float] | None = None) -> list[int]:
  """Clusters with the largest count (or sum of weights), in order of appearance; [] if all are -1.

  The first one is the winner; further ones are tied with it.
  """
  total: dict[int, float] = {}
  for i, group in enumerate(groups):
    if group >= 0:
      total[group] = total.get(group, 0.0) + (1.0 if weights is None else float(weights[i]))
  best = max(total.values(), default=0.0)
  return [g for g in sorted(total) if total[g] == best]


def best_of_n(scores: Sequence[float]) -> int:
  """Index of the highest score, the first among equals; NaN never wins. Raises ValueError if none
  is a number."""
  scores = np.asarray(scores, np.float64)
  if not scores.size or np.isnan(scores).all():
    raise ValueError(f'scores must hold a number, got {scores.tolist()}')
  return int(np.nanargmax(scores))


def maj_at_k(groups: Sequence[int], right: Sequence[bool], k: int, rng: np.random.Generator, *,
             subsamples: int = 100) -> tuple[float, float]:
  """Chance that the vote of k samples without replacement is right; NaN if n < k.

  Exact for k = n, else the mean over `subsamples` draws. Ties go to the cluster that appears first,
  in the second figure equally to all of them; samples without an answer have no vote.
  """
  groups, right = np.asarray(groups), np.asarray(right, bool)
  _check(len(groups), int(right.sum()), k)
  if len(groups) < k:
    return math.nan, math.nan

  def won(rows) -> tuple[float, float]:
    rows = np.sort(rows)
    names = {g: i for i, g in reversed(list(enumerate(groups[rows])))}  # first appearance
    order = sorted(names, key=names.get)
    renamed = [order.index(g) if g >= 0 else -1 for g in groups[rows]]
    winners = vote(renamed)
    good = [float(right[rows][renamed.index(w)]) for w in winners]
    return (good[0], sum(good) / len(good)) if good else (0.0, 0.0)

  if len(groups) == k:
    return won(np.arange(k))
  draws = [won(rng.choice(len(groups), k, replace=False)) for _ in range(subsamples)]
  return tuple(float(x) for x in np.mean(draws, axis=0))
