"""Group statistics against numpy, unscorable rows, and the host check of ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax.ops import groups

group_stats = jax.jit(groups.group_stats, static_argnames=('num_groups', 'ddof'))


def test_statistics_match_numpy_for_interleaved_groups_of_uneven_size():
  rng = np.random.default_rng(0)
  gid = rng.permutation(np.repeat([0, 1, 2], [3, 5, 4]))
  reward = rng.normal(size=12).astype(np.float32)
  for ddof in (0, 1):
    stats = group_stats(reward, gid, np.ones(12, bool), num_groups=3, ddof=ddof)
    for g in range(3):
      r = reward[gid == g]
      np.testing.assert_allclose(stats.mean[g], r.mean(), rtol=1e-6)
      np.testing.assert_allclose(stats.std[g], r.std(ddof=ddof), rtol=1e-6)
      assert (stats.low[g], stats.high[g], stats.count[g]) == (r.min(), r.max(), len(r))
  assert not stats.trivial.any()


def test_trivial_is_max_equal_min_even_where_the_float_mean_is_inexact():
  reward = np.full(7, 0.1, np.float32)
  stats = group_stats(reward, np.zeros(7, int), np.ones(7, bool), num_groups=1)
  assert stats.trivial.all()
  reward[3] = np.nextafter(np.float32(0.1), np.float32(1))
  stats = group_stats(reward, np.zeros(7, int), np.ones(7, bool), num_groups=1)
  assert not stats.trivial.any()


def test_nan_and_invalid_rows_are_left_out_and_fewer_than_two_is_trivial():
  reward = jnp.array([1.0, 0.0, jnp.nan, 5.0, 3.0, jnp.nan, 7.0, 7.5])
  gid = jnp.array([0, 0, 0, 0, 1, 1, 2, 2])
  valid = jnp.array([1, 1, 1, 0, 1, 1, 0, 0], bool)
  stats = group_stats(reward, gid, valid, num_groups=4)
  np.testing.assert_array_equal(stats.count, [2, 1, 0, 0])
  np.testing.assert_array_equal(stats.trivial, [False, True, True, True])
  np.testing.assert_allclose(stats.mean, [0.5, 3.0, 0.0, 0.0])
  np.testing.assert_allclose(stats.std, [np.sqrt(0.5), 0, 0, 0], rtol=1e-6)


def test_rows_with_an_id_out_of_range_enter_no_group():
  gid = jnp.array([0, 0, -1, 2])
  stats = group_stats(jnp.array([1.0, 0, 9, 9]), gid, jnp.ones(4, bool), num_groups=2)
  np.testing.assert_array_equal(stats.count, [2, 0])
  np.testing.assert_allclose(stats.mean, [0.5, 0])


def test_large_offset_does_not_cancel_the_std():
  reward = jnp.array([1000.0, 1001.0, 1002.0, 1003.0])
  stats = group_stats(reward, jnp.zeros(4, int), jnp.ones(4, bool), num_groups=1)
  np.testing.assert_allclose(stats.std, [np.std([0, 1, 2, 3], ddof=1)], rtol=1e-6)


def test_integer_rewards_and_jit():
  args = (jnp.array([1, 0, 0, 1]), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
  plain = groups.group_stats(*args, num_groups=2)
  jitted = group_stats(*args, num_groups=2)
  assert plain.mean.dtype == jnp.float32
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, jitted)


@pytest.mark.parametrize(
  'ids, message',
  [
    ([0, 0, 1, 2], r'group_id must be in \[0, num_groups=2\), got 2'),
    ([0, 0, 1, -1], r'got -1'),
    ([0, 0, 0, 1], r'group_size=2 rows, group 1 has 1'),
    ([0.0, 0.0, 1.0, 1.0], r'integer vector'),
    ([[0, 0], [1, 1]], r'integer vector'),
  ],
)
def test_bad_group_ids_are_named(ids, message):
  with pytest.raises(ValueError, match=message):
    groups.check_group_ids(np.array(ids), 2, 2)


def test_good_group_ids_pass_in_any_order():
  groups.check_group_ids(np.array([1, 0, 1, 0]), 2, 2)
  groups.check_group_ids(np.array([1, 0, 1, 0, 0]), 2, 2)  # a trajectory of two rows
  groups.check_group_ids(np.array([2, 2]), 3, 2)  # of slots that stay empty nothing is asked
