"""Sampler weights by hand, the identity w = 1, and the mismatch metrics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax.ops import importance

RATIO = np.array([[3.0, 0.25, 1.0, 9.0], [1.5, 1.25, 9.0, 9.0], [0.5, 0.5, 1.0, 9.0]])
MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
OLD = jnp.where(MASK, jnp.log(RATIO) - 2.0, jnp.nan)
BEHAVIOR = jnp.where(MASK, -2.0, jnp.nan)
WANT = {  # cap 2; sequence products 0.75, 1.875, 0.25
  'none': np.ones((3, 4)),
  'token_tis': [[2, 0.25, 1, 0], [1.5, 1.25, 0, 0], [0.5, 0.5, 1, 0]],
  'seq_tis': np.repeat([[0.75], [1.875], [0.25]], 4, 1),
  'token_mask': [[0, 0, 1, 0], [1.5, 1.25, 0, 0], [0.5, 0.5, 1, 0]],
  'seq_mask': np.repeat([[0.75], [1.875], [0.25]], 4, 1),
}


@pytest.mark.parametrize('mode', importance.MODES)
def test_weights_by_hand_with_nan_outside_the_mask(mode):
  fn = functools.partial(importance.sampler_weights, mode=mode)
  want = np.where(MASK, WANT[mode], 0)
  # 1 / cap and cap belong to the band; keep float rounding of 0.5 away from the edge
  got = fn(OLD, BEHAVIOR, MASK, cap=2.0001)
  np.testing.assert_allclose(got, want, rtol=1e-4)
  np.testing.assert_allclose(jax.jit(fn)(OLD, BEHAVIOR, MASK), fn(OLD, BEHAVIOR, MASK), rtol=1e-6)


def test_sequence_mask_has_an_upper_bound_and_an_optional_lower_one():
  fn = functools.partial(importance.sampler_weights, OLD, BEHAVIOR, MASK, mode='seq_mask')
  np.testing.assert_allclose(fn(cap=1.5)[:, 0], [0.75, 0, 0.25], rtol=1e-6)
  np.testing.assert_allclose(fn(cap=1.5, floor=0.5)[:, 0], [0.75, 0, 0], rtol=1e-6)
  tis = importance.sampler_weights(OLD, BEHAVIOR, MASK, mode='seq_tis', cap=1.5)
  np.testing.assert_allclose(tis[:, 0], [0.75, 1.5, 0.25], rtol=1e-6)


@pytest.mark.parametrize('mode', importance.MODES)
def test_equal_log_probs_weigh_one_and_nothing_is_differentiated(mode):
  fn = lambda old, roll: importance.sampler_weights(old, roll, MASK, mode=mode)
  np.testing.assert_array_equal(fn(OLD, OLD), MASK)
  for g in jax.grad(lambda *x: fn(*x).sum(), argnums=(0, 1))(jnp.zeros((3, 4)), jnp.ones((3, 4))):
    np.testing.assert_array_equal(g, 0)


def test_extreme_gaps_stay_finite():
  far = jnp.full((1, 2), 300.0)
  for mode in importance.MODES:
    for sign in (1, -1):
      w = importance.sampler_weights(sign * far, 0 * far, jnp.ones((1, 2), bool), mode=mode)
      assert np.isfinite(w).all()
  assert np.isfinite(importance.mismatch(far, 0 * far, jnp.ones((1, 2), bool))['kl_k3'])


def test_mismatch_by_hand():
  out = importance.mismatch(OLD, BEHAVIOR, MASK, cap=1.9)
  d = np.log(RATIO[MASK])
  np.testing.assert_allclose(out['kl_k3'], np.mean(np.exp(d) - 1 - d), rtol=1e-5)
  np.testing.assert_allclose(out['max_abs'], np.log(4), rtol=1e-6)
  np.testing.assert_allclose(out['mean_abs'], np.abs(d).mean(), rtol=1e-6)
  np.testing.assert_allclose(out['frac_over'], 4 / 8, rtol=1e-6)
  for value in importance.mismatch(OLD, OLD, MASK).values():
    assert value == 0


@pytest.mark.parametrize(
  'kwargs, message',
  [
    (dict(mode='tis'), "mode must be one of .* got 'tis'"),
    (dict(mode='token_tis', cap=0.5), 'cap must be >= 1, got 0.5'),
    (dict(mode='seq_mask', floor=1.5), r'floor must be in \[0, 1\] or None, got 1.5'),
  ],
)
def test_bad_input_is_named(kwargs, message):
  with pytest.raises(ValueError, match=message):
    importance.sampler_weights(OLD, BEHAVIOR, MASK, **kwargs)
