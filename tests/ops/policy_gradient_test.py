"""A 3-arm softmax bandit: which estimators give the policy gradient (miniature 7)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax.ops import advantages, surrogates

G, ARMS = 4, 3
LOGITS = jnp.array([0.4, -0.3, 0.1])
PAYOFF = jnp.array([1.0, 0.2, 0.5])
PI = jax.nn.softmax(LOGITS)
EXACT = np.asarray(jax.grad(lambda z: -(jax.nn.softmax(z) * PAYOFF).sum())(LOGITS))
ESTIMATORS = {
  'reinforce': lambda reward, gid, ok, num_groups: advantages.reinforce(reward, ok, baseline=0.3),
  'rloo': advantages.rloo,
  'dr_grpo': lambda *a, **k: advantages.dr_grpo(*a, **k) * G / (G - 1),
  'grpo': advantages.grpo,
}


def group_gradients(estimator, arms):
  """Gradient of the mean loss of each group, f32[groups, ARMS], and its advantages."""
  count = len(arms)
  gid = jnp.repeat(jnp.arange(count), G)
  reward = PAYOFF[arms].reshape(-1)
  a = estimator(reward, gid, jnp.ones(count * G, bool), num_groups=count).reshape(count, G)
  loss = lambda z, arms, a: surrogates.reinforce(jax.nn.log_softmax(z)[arms], a).mean()
  return jax.vmap(jax.grad(loss), (None, 0, 0))(LOGITS, arms, a)


run = jax.jit(group_gradients, static_argnums=0)


@pytest.mark.parametrize('name', ['rloo', 'dr_grpo'])
def test_averaged_over_groups_it_is_the_policy_gradient(name):
  arms = jax.random.categorical(jax.random.key(0), LOGITS, shape=(20_000, G))
  g = np.asarray(run(ESTIMATORS[name], arms), np.float64)
  error = g.std(0) / np.sqrt(len(g))
  assert (np.abs(g.mean(0) - EXACT) < 3 * error).all()
  assert error.max() < 0.05 * np.abs(EXACT).max()  # the test can fail


def all_groups():
  arms = jnp.array(list(itertools.product(range(ARMS), repeat=G)))
  return arms, np.asarray(jnp.prod(PI[arms], axis=1), np.float64)


def test_by_enumeration_rloo_is_unbiased_and_grpo_is_not():
  arms, prob = all_groups()
  mean = {k: prob @ np.asarray(run(fn, arms)) for k, fn in ESTIMATORS.items()}
  np.testing.assert_allclose(mean['reinforce'], EXACT, atol=1e-6)
  np.testing.assert_allclose(mean['rloo'], EXACT, atol=1e-6)
  np.testing.assert_allclose(mean['dr_grpo'], EXACT, atol=1e-6)
  assert np.abs(mean['grpo'] - EXACT).max() > 0.5 * np.abs(EXACT).max()


def test_grpo_is_dr_grpo_over_the_std_of_each_group():
  arms, _ = all_groups()
  std = np.asarray(PAYOFF)[np.asarray(arms)].std(1, ddof=1)
  live = std > 1e-6
  dr, grpo = np.asarray(run(advantages.dr_grpo, arms)), np.asarray(run(advantages.grpo, arms))
  np.testing.assert_allclose(grpo[live], dr[live] / (std[live, None] + 1e-6), rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(grpo[~live], 0)
  assert live.sum() == 78
