"""Exact truths of grpo-baselines.md (miniature 1, 2) and zppo.md (truth 1), GAE against rlax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax.ops import advantages, aggregate, surrogates

P, G = 6, 4
N = P * G
GID = np.repeat(np.arange(P), G)
ALL = np.ones(N, bool)
RAW = {
  'rloo': advantages.rloo,
  'grpo': advantages.grpo,
  'grpo_batch_scaled': advantages.grpo_batch_scaled,
  'dr_grpo': advantages.dr_grpo,
  'pp_none': functools.partial(advantages.reinforce_pp_baseline, norm='none'),
  'pp_without_zero': advantages.reinforce_pp_baseline,
  'pp_with_zero': functools.partial(advantages.reinforce_pp_baseline, norm='with_zero'),
}
STATIC = ('num_groups', 'norm', 'over', 'ddof', 'eps')
pp_baseline = jax.jit(advantages.reinforce_pp_baseline, static_argnames=STATIC)
gae = jax.jit(advantages.gae, static_argnames=('gamma', 'lam'))
grpo = jax.jit(advantages.grpo, static_argnames=STATIC[:1] + STATIC[3:])
GROUPED = {k: jax.jit(f, static_argnames='num_groups') for k, f in RAW.items()}


def rewards(seed=0):
  return np.random.default_rng(seed).normal(size=N).astype(np.float32)


def test_rloo_is_a_multiple_of_dr_grpo_and_leaves_one_out():
  r = rewards()
  rloo = GROUPED['rloo'](r, GID, ALL, num_groups=P)
  dr = GROUPED['dr_grpo'](r, GID, ALL, num_groups=P)
  np.testing.assert_allclose(rloo, G / (G - 1) * dr, atol=1e-6)
  others = (r.reshape(P, G).sum(1, keepdims=True) - r.reshape(P, G)) / (G - 1)
  np.testing.assert_allclose(rloo, (r.reshape(P, G) - others).ravel(), atol=1e-6)


def test_grpo_has_mean_zero_and_sample_std_one():
  a = np.asarray(grpo(rewards(), GID, ALL, num_groups=P, eps=0.0)).reshape(P, G)
  np.testing.assert_allclose(a.mean(1), 0, atol=1e-6)
  np.testing.assert_allclose(a.std(1, ddof=1), 1, atol=1e-5)
  a = grpo(rewards(), GID, ALL, num_groups=P, eps=0.0, ddof=0)
  np.testing.assert_allclose(np.asarray(a).reshape(P, G).std(1), 1, atol=1e-5)


def test_grpo_eps_is_added_to_the_std():
  a = grpo(np.float32([1, 0]), np.zeros(2, int), ALL[:2], num_groups=1, eps=0.25)
  np.testing.assert_allclose(a, np.array([0.5, -0.5]) / (np.sqrt(0.5) + 0.25), rtol=1e-6)


def test_batch_scaled_uses_the_std_of_the_uncentred_rewards():
  r = rewards() + 3 * GID.astype(np.float32)
  a = GROUPED['grpo_batch_scaled'](r, GID, ALL, num_groups=P)
  dr = GROUPED['dr_grpo'](r, GID, ALL, num_groups=P)
  np.testing.assert_allclose(a, np.asarray(dr) / (r.std(ddof=1) + 1e-4), rtol=1e-5)


@pytest.mark.parametrize('name', sorted(GROUPED))
def test_equal_rewards_give_exactly_zero_advantage_and_gradient(name):
  r = np.repeat(np.float32([0.1, 0.7, 1.0, 0.0, 1e8, -3.3]), G)
  a = GROUPED[name](r, GID, ALL, num_groups=P)
  np.testing.assert_array_equal(a, np.zeros(N))
  logp = jnp.log(jnp.linspace(0.1, 0.9, N))[:, None]
  mask = jnp.ones((N, 1), bool)

  def loss(x):
    token = surrogates.clipped(
      x, logp - 0.1, advantages.broadcast(a, mask), eps_low=0.2, eps_high=0.28, dual_clip=10.0
    )
    num, den = aggregate.aggregate(token, mask, 'token_mean')
    return num / den

  np.testing.assert_array_equal(jax.jit(jax.grad(loss))(logp), np.zeros((N, 1)))


@pytest.mark.parametrize('name', sorted(GROUPED))
def test_unscorable_and_invalid_rows_get_zero_and_change_nothing(name):
  r, valid = rewards(1), ALL.copy()
  r[:G] = 1.0  # group 0 trivial
  r[5], r[10], valid[10], valid[11] = np.nan, np.nan, False, False
  a = np.asarray(GROUPED[name](r, GID, valid, num_groups=P))
  off = np.array([0, 1, 2, 3, 5, 10, 11])
  np.testing.assert_array_equal(a[off], np.zeros(len(off)))
  keep = np.setdiff1d(np.arange(N), [5, 10, 11])
  again = GROUPED[name](r[keep], GID[keep], ALL[keep], num_groups=P)
  np.testing.assert_allclose(a[keep], again, rtol=1e-5, atol=1e-6)
  assert np.abs(a[keep][G:]).min() > 0


def test_affine_invariance():
  r, grouped = rewards(), functools.partial
  for fn, power in ((grouped(grpo, eps=0.0), 0), (GROUPED['rloo'], 1)):
    base = np.asarray(fn(r, GID, ALL, num_groups=P))
    moved = fn(4.0 * r + 2.0, GID, ALL, num_groups=P)
    np.testing.assert_allclose(moved, base * 4.0**power, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize('name', sorted(GROUPED))
def test_group_order_and_jit_do_not_matter(name):
  r = rewards(2)
  a = np.asarray(RAW[name](r, GID, ALL, num_groups=P))
  order = np.random.default_rng(3).permutation(N)
  jitted = GROUPED[name](r[order], GID[order], ALL, num_groups=P)
  np.testing.assert_allclose(jitted, a[order], rtol=1e-5, atol=1e-6)


# Two-step advantage of ZPPO.


def test_worked_numbers_of_the_two_step_advantage():
  r = np.float32([1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0])
  gid, ok = np.repeat(np.arange(3), 4), np.ones(12, bool)
  fn = functools.partial(pp_baseline, r, gid, ok, num_groups=3)
  without, with_zero, none = fn(), fn(norm='with_zero'), fn(norm='none')
  w = [1.6036, -0.5345, -0.5345, -0.5345, 1.0690, 1.0690, -1.0690, -1.0690, 0, 0, 0, 0]
  z = [1.9640, -0.6547, -0.6547, -0.6547, 1.3093, 1.3093, -1.3093, -1.3093, 0, 0, 0, 0]
  np.testing.assert_allclose(without, w, atol=5.1e-5)
  np.testing.assert_allclose(with_zero, z, atol=5.1e-5)
  np.testing.assert_allclose(none, [0.75] + [-0.25] * 3 + [0.5] * 2 + [-0.5] * 2 + [0] * 4)
  np.testing.assert_allclose(none[0] / without[0], 0.467707, atol=1e-5)  # sigma over G*
  np.testing.assert_allclose(none[0] / with_zero[0], 0.381881, atol=1e-5)  # sigma over all groups
  for a in (without, with_zero, none):
    np.testing.assert_array_equal(a[8:], np.zeros(4))


@pytest.mark.parametrize('seed', range(5))
def test_closed_form_of_the_norm_with_zero(seed):
  groups, size = 40, 8
  r = np.random.default_rng(seed).binomial(1, 0.12, groups * size).astype(np.float32)
  gid, ok = np.repeat(np.arange(groups), size), np.ones(groups * size, bool)
  f = np.mean(r.reshape(groups, size).std(1) > 0)
  assert 0 < f < 1
  fn = functools.partial(pp_baseline, r, gid, ok, num_groups=groups)
  np.testing.assert_allclose(fn(norm='with_zero'), fn() / np.sqrt(f), rtol=1e-5)


def test_over_tokens_weighs_long_responses_more():
  r = np.float32([1, 0, 0, 0.5])
  gid, tokens = np.array([0, 0, 1, 1]), np.float32([1, 3, 5, 2])
  a = pp_baseline(
    r, gid, ALL[:4], num_groups=2, over='tokens', token_counts=tokens, ddof=1, eps=0.0
  )
  x = np.repeat([0.5, -0.5, -0.25, 0.25], tokens.astype(int))
  want = (np.array([0.5, -0.5, -0.25, 0.25]) - x.mean()) / x.std(ddof=1)
  np.testing.assert_allclose(a, want, rtol=1e-5)


def test_token_counts_of_left_out_rows_do_not_matter():
  r, gid = np.float32([1, 0, 1, 1, np.nan]), np.array([0, 0, 1, 1, 0])
  fn = functools.partial(
    pp_baseline, r, gid, ALL[:5], num_groups=2, over='tokens'
  )
  a = fn(token_counts=np.float32([2, 3, 4, 5, 6]))
  b = fn(token_counts=np.float32([2, 3, 400, np.nan, np.nan]))
  np.testing.assert_array_equal(a, b)


# Ungrouped estimators.


def test_reinforce_and_remax():
  r, valid = np.float32([1, 0, 5, np.nan]), np.array([True, True, False, True])
  np.testing.assert_allclose(advantages.reinforce(r, valid), [0.5, -0.5, 0, 0])
  np.testing.assert_allclose(advantages.reinforce(r, valid, baseline=0.25), [0.75, -0.25, 0, 0])
  greedy = np.float32([0.5, 0.5, 1, 1])
  np.testing.assert_allclose(advantages.remax(r, greedy), [0.5, -0.5, 4, 0])
  np.testing.assert_allclose(advantages.remax(r, greedy, valid), [0.5, -0.5, 0, 0])


def test_overlong_penalty_is_zero_below_the_buffer_and_minus_factor_at_the_limit():
  length = np.array([100, 16384, 18432, 20480])
  fn = functools.partial(
    advantages.overlong_penalty, length, max_tokens=20480, buffer_tokens=4096
  )
  np.testing.assert_allclose(fn(), [0, 0, -0.5, -1], atol=1e-7)
  np.testing.assert_allclose(fn(factor=2.0), [0, 0, -1, -2], atol=1e-7)


def tokens(seed=0, n=5, t=9):
  rng = np.random.default_rng(seed)
  mask = rng.random((n, t)) < 0.6
  mask[0], mask[1] = True, False
  return rng.normal(size=(2, n, t)).astype(np.float32), mask


def test_gae_matches_rlax_on_the_masked_in_tokens():
  rlax = pytest.importorskip('rlax')
  oracle = jax.jit(rlax.truncated_generalized_advantage_estimation)
  (r, v), mask = tokens()
  adv, ret = jax.device_get(gae(r, v, mask, gamma=0.97, lam=0.9))
  for i in range(len(r)):
    keep = mask[i]
    if keep.any():
      # rlax wants one length: rewards and discounts are zero after the last token
      pad = lambda x: np.append(x, np.zeros(10 - len(x))).astype(np.float32)
      rewards, values = pad(r[i][keep])[:9], pad(v[i][keep])
      discounts = pad(np.full(keep.sum(), 0.97))[:9]
      want = np.asarray(oracle(rewards, discounts, 0.9, values))[: keep.sum()]
      np.testing.assert_allclose(adv[i, keep], want, rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(ret[i, keep], want + v[i][keep], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(adv[i, ~keep], 0)
    np.testing.assert_array_equal(ret[i, ~keep], 0)


def test_gae_with_gamma_and_lambda_one_is_return_minus_value():
  (r, v), mask = tokens(1)
  adv, ret = gae(r, v, mask)
  rest = np.cumsum((r * mask)[:, ::-1], 1)[:, ::-1]
  np.testing.assert_allclose(ret, rest * mask, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(adv, (rest - v) * mask, rtol=1e-5, atol=1e-5)


def test_reinforce_pp_is_the_whitened_return():
  (r, _), mask = tokens(2)
  a = np.asarray(advantages.reinforce_pp(r, mask, gamma=0.9))
  want = np.zeros_like(r)
  for i in range(len(r)):
    acc = 0.0
    for t in reversed(range(r.shape[1])):
      if mask[i, t]:
        acc = r[i, t] + 0.9 * acc
        want[i, t] = acc
  x = want[mask]
  np.testing.assert_allclose(a[mask], (x - x.mean()) / x.std(ddof=1), rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(a[~mask], 0)


def test_whiten_of_one_token_or_none_is_zero_not_nan():
  x, mask = np.full((2, 3), 7.0), np.zeros((2, 3), bool)
  np.testing.assert_array_equal(advantages.whiten(x, mask), 0)
  mask[1, 2] = True
  np.testing.assert_array_equal(advantages.whiten(x, mask), 0)


@pytest.mark.parametrize('fn', ['gae', 'reinforce_pp', 'whiten', 'broadcast'])
def test_nan_outside_the_mask_changes_nothing_and_jit_agrees(fn):
  (r, v), mask = tokens(3)
  bad_r, bad_v = np.where(mask, r, np.nan), np.where(mask, v, np.nan)
  calls = {
    'gae': lambda r, v, m: advantages.gae(r, v, m, gamma=0.9, lam=0.8),
    'reinforce_pp': lambda r, v, m: advantages.reinforce_pp(r, m),
    'whiten': lambda r, v, m: advantages.whiten(r, m),
    'broadcast': lambda r, v, m: advantages.broadcast(
      jnp.where(m.any(1), jnp.where(m, r, 0).sum(1), jnp.nan), m
    ),
  }
  clean, dirty = calls[fn](r, v, mask), calls[fn](bad_r, bad_v, mask)
  jitted = jax.jit(calls[fn])(bad_r, bad_v, mask)
  jax.tree.map(np.testing.assert_array_equal, clean, dirty)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), clean, jitted)


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: advantages.check_group_size('grpo', 1), r'group_size must be >= 2 .*grpo.* got 1'),
    (lambda: advantages.check_group_size('reinforce', 0), r'group_size must be >= 1'),
    (lambda: RAW['pp_none'](rewards(), GID, ALL, num_groups=P, over='rows'), r"over .*'rows'"),
    (lambda: RAW['pp_none'](rewards(), GID, ALL, num_groups=P, over='tokens'), r'token_counts'),
    (
      lambda: advantages.reinforce_pp_baseline(rewards(), GID, ALL, num_groups=P, norm='all'),
      r"norm .*'all'",
    ),
    (lambda: advantages.gae(*tokens()[0], tokens()[1], gamma=1.1), r'gamma .* got 1.1'),
    (lambda: advantages.gae(*tokens()[0], tokens()[1], lam=-0.1), r'lam .* got -0.1'),
    (lambda: advantages.reinforce_pp(tokens()[0][0], tokens()[1], gamma=2.0), r'gamma .* got 2'),
    (
      lambda: advantages.overlong_penalty(np.array([1]), max_tokens=8, buffer_tokens=9),
      r'buffer_tokens must be in \[1, 8\], got 9',
    ),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_group_sizes_that_are_fine():
  advantages.check_group_size('grpo', 2)
  advantages.check_group_size('remax', 1)
