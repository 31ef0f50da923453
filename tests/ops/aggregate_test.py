"""Aggregation: printed formulas, shards, trajectories of several rows (grpo-baselines.md, 5)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax.ops import aggregate

LOSS = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
MASK = np.arange(5) < np.array([5, 2, 0, 3])[:, None]


pair = jax.jit(aggregate.aggregate, static_argnames=('mode', 'max_tokens'))


def reduce(loss, mask, mode, **kwargs):
  num, den = aggregate.aggregate(loss, mask, mode, max_tokens=7, **kwargs)
  return num / den


def test_every_mode_is_its_formula_without_empty_rows():
  rows = [LOSS[i][MASK[i]] for i in (0, 1, 3)]
  want = {
    'token_mean': np.concatenate(rows).mean(),
    'seq_mean_token_mean': np.mean([x.mean() for x in rows]),
    'seq_mean_token_sum': np.mean([x.sum() for x in rows]),
    'seq_mean_token_sum_norm': np.concatenate(rows).sum() / (3 * 7),
  }
  assert set(want) == set(aggregate.MODES)
  for mode, value in want.items():
    np.testing.assert_allclose(reduce(LOSS, MASK, mode), value, rtol=1e-5)


@pytest.mark.parametrize('mode', aggregate.MODES)
def test_uneven_shards_add_up_but_means_of_means_do_not(mode):
  cuts = [(slice(0, 1), slice(1, 4)), (slice(0, 2), slice(2, 4)), (slice(0, 3), slice(3, 4))]
  whole = reduce(LOSS, MASK, mode)
  for cut in cuts:
    parts = [pair(LOSS[s], MASK[s], mode, max_tokens=7) for s in cut]
    (n1, d1), (n2, d2) = jax.device_get(parts)
    np.testing.assert_allclose((n1 + n2) / (d1 + d2), whole, rtol=1e-6)
  naive = 0.5 * (n1 / d1 + n2 / d2)
  assert abs(naive - whole) > 1e-3


@pytest.mark.parametrize('mode', aggregate.MODES)
def test_a_trajectory_cut_into_rows_weighs_as_one(mode):
  one_loss, one_mask = LOSS[:2], MASK[:2]
  cut_loss = np.stack([LOSS[0], LOSS[0], LOSS[1], LOSS[2]])
  cut_mask = np.stack([np.arange(5) < 2, np.arange(5) >= 2, MASK[1], MASK[2]])
  traj_tokens = np.float32([5, 5, 2, 0])
  np.testing.assert_allclose(
    reduce(cut_loss, cut_mask, mode, traj_tokens=traj_tokens),
    reduce(one_loss, one_mask, mode),
    rtol=1e-6,
  )


@pytest.mark.parametrize('mode', aggregate.MODES)
def test_nan_and_gradient_outside_the_mask(mode):
  bad = np.where(MASK, LOSS, np.nan)
  fn = jax.jit(lambda x: reduce(x, MASK, mode))
  np.testing.assert_array_equal(fn(bad), fn(LOSS))
  np.testing.assert_allclose(fn(LOSS), reduce(LOSS, MASK, mode), rtol=1e-6)
  grad = jax.grad(fn)(bad)
  np.testing.assert_array_equal(np.asarray(grad) != 0, MASK)


@pytest.mark.parametrize('mode', aggregate.MODES)
def test_an_empty_batch_is_zero_over_zero_parts(mode):
  num, den = aggregate.aggregate(LOSS, np.zeros_like(MASK), mode, max_tokens=7)
  assert (num, den) == (0, 0)


def test_half_precision_losses_are_summed_in_float32():
  num, den = aggregate.aggregate(jnp.ones((64, 64), jnp.bfloat16), jnp.ones((64, 64)), 'token_mean')
  assert num.dtype == den.dtype == jnp.float32 and num == den == 4096


def test_bad_modes_are_named():
  with pytest.raises(ValueError, match="mode must be one of .* got 'mean'"):
    aggregate.aggregate(LOSS, MASK, 'mean')
  with pytest.raises(ValueError, match='max_tokens must be >= 1 .* got None'):
    aggregate.aggregate(LOSS, MASK, 'seq_mean_token_sum_norm')
  with pytest.raises(ValueError, match="aggregation must be one of .* got 'mean'"):
    aggregate.check_aggregation('mean', 'clipped')
  for mode in ('seq_mean_token_sum', 'seq_mean_token_sum_norm'):
    with pytest.raises(ValueError, match=f"aggregation .* 'gspo', got '{mode}'"):
      aggregate.check_aggregation(mode, 'gspo')
    aggregate.check_aggregation(mode, 'clipped')
  aggregate.check_aggregation('seq_mean_token_mean', 'gspo')
