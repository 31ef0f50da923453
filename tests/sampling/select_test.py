"""Selection over samples against counting by hand."""

import itertools
import math

import numpy as np
import pytest

from zppo_jax.sampling import select


@pytest.mark.parametrize('n, c', [(1, 0), (1, 1), (4, 0), (4, 1), (6, 3), (5, 5)])
def test_pass_and_all_are_averages_over_subsets(n, c):
  right = [True] * c + [False] * (n - c)
  for k in range(1, n + 1):
    subsets = list(itertools.combinations(right, k))
    assert select.pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))
    assert select.all_at_k(n, c, k) == pytest.approx(np.mean([all(s) for s in subsets]))
  assert math.isnan(select.pass_at_k(n, c, n + 1)) and math.isnan(select.all_at_k(n, c, n + 1))


@pytest.mark.parametrize('n, c, k, message', [
  (3, 4, 1, 'c must lie in 0..n = 3, got 4'), (3, -1, 1, 'got -1'),
  (3, 1, 0, 'k must be at least')])
def test_counts_out_of_range_are_refused(n, c, k, message):
  with pytest.raises(ValueError, match=message):
    select.pass_at_k(n, c, k)


def test_clusters_and_votes():
  assert select.clusters(['a', None, 'b', 'a', None]) == [0, -1, 1, 0, -1]
  halves = select.clusters(['1/2', '0.5', '2'], lambda a, b: eval(a) == eval(b))
  assert halves == [0, 0, 1]
  assert select.vote([0, -1, 1, 0, -1]) == [0]
  assert select.vote([0, 1, 1, 0, 2]) == [0, 1]  # tied, the first to appear wins
  assert select.vote([-1, -1]) == []
  assert select.vote([0, 1, 1], weights=[3.0, 1.0, 1.0]) == [0]


def test_best_of_n_takes_the_first_of_equals_and_never_nan():
  assert select.best_of_n([1.0, 3.0, 3.0]) == 1
  assert select.best_of_n([math.nan, -1.0]) == 1
  with pytest.raises(ValueError, match='scores must hold a number'):
    select.best_of_n([math.nan])


def test_majority_of_all_and_of_subsets():
  rng = np.random.default_rng(0)
  groups, right = [0, 1, 1, 0, 2, -1], [True, False, False, True, False, False]
  assert select.maj_at_k(groups, right, 6, rng) == (1.0, 0.5)  # tied with 1, appears first
  assert select.maj_at_k([0, 1, 1], [True, False, False], 3, rng) == (0.0, 0.0)
  assert select.maj_at_k([-1, -1], [False, False], 2, rng) == (0.0, 0.0)
  assert all(map(math.isnan, select.maj_at_k(groups, right, 7, rng)))

  def by_hand(k):
    won, shared = [], []
    for rows in itertools.combinations(range(6), k):
      votes = [groups[r] for r in rows if groups[r] >= 0]
      if not votes:
        won.append(False)
        shared.append(0.0)
        continue
      winner = max(dict.fromkeys(votes), key=votes.count)  # max keeps the first of equals
      won.append(right[groups.index(winner)])
      tied = [v for v in set(votes) if votes.count(v) == votes.count(winner)]
      shared.append(np.mean([right[groups.index(v)] for v in tied]))
    return np.mean(won), np.mean(shared)

  for k in (1, 2, 3, 5):
    found = select.maj_at_k(groups, right, k, rng, subsamples=4000)
    assert found == pytest.approx(by_hand(k), abs=0.03), k
