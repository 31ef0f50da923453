"""Errors of means against their definitions and against simulation."""

import math

import numpy as np
import pytest

from zppo_jax.ops import intervals


def test_standard_error_is_that_of_a_mean():
  x = np.random.default_rng(0).normal(size=50)
  wanted = x.std(ddof=1) / 50**0.5
  assert intervals.standard_error(x) == pytest.approx(wanted)
  assert intervals.standard_error(x, np.arange(50)) == pytest.approx(wanted)
  assert math.isnan(intervals.standard_error([1.0]))
  with pytest.raises(ValueError, match='clusters: 2 for 3 values'):
    intervals.standard_error([1.0, 2.0, 3.0], [0, 1])


def test_questions_of_one_passage_count_once():
  """Ten copies of each value say no more than one of each."""
  x = np.random.default_rng(0).normal(size=30)
  copies, passage = np.repeat(x, 10), np.repeat(np.arange(30), 10)
  assert intervals.standard_error(copies, passage) == pytest.approx(intervals.standard_error(x))
  assert intervals.standard_error(copies) < 0.4 * intervals.standard_error(x)


def test_pairs_cancel_what_both_share():
  rng = np.random.default_rng(0)
  shared, small = rng.normal(size=100), 0.1 * rng.normal(size=100)
  found = intervals.paired_error(shared + small, shared)
  assert found == pytest.approx(intervals.standard_error(small))
  with pytest.raises(ValueError, match='same questions, got 2 and 3'):
    intervals.paired_error([1, 2], [1, 2, 3])


def test_bootstrap_covers_the_mean_as_often_as_it_says():
  rng, hits = np.random.default_rng(0), 0
  for _ in range(200):
    low, high = intervals.bootstrap(rng.normal(size=40), np.mean, rng, draws=200)
    hits += low <= 0 <= high
  assert 175 <= hits <= 199
  with pytest.raises(ValueError, match='level 1.5'):
    intervals.bootstrap([1.0], np.mean, rng, level=1.5)
