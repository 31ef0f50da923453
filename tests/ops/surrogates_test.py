"""The gradient table, identities at r = 1, clip metrics (grpo-baselines.md, miniature 3 and 4)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax.ops import aggregate, surrogates

RATIOS = np.array([1e-3, 0.3, 0.79, 0.81, 0.95, 1, 1.05, 1.19, 1.27, 1.29, 2, 3.9, 4.1, 9.9, 11])
GRID_R, GRID_A = (x.ravel() for x in np.meshgrid(RATIOS, [-2.0, -1.0, 0.0, 0.5, 3.0]))
CLIP = dict(eps_low=0.2, eps_high=0.28)


def value_and_grad(**kwargs):
  logp, old = jnp.log(GRID_R), jnp.zeros(len(GRID_R))
  fn = lambda x: surrogates.clipped(x, old, jnp.array(GRID_A), **kwargs)
  return jax.jit(lambda x: (fn(x), jax.grad(lambda x: fn(x).sum())(x)))(logp)


@pytest.mark.parametrize('dual, delta', [(None, None), (10.0, None), (None, 4.0), (None, 1.1)])
def test_value_is_the_printed_formula(dual, delta):
  value, _ = value_and_grad(**CLIP, dual_clip=dual, delta=delta)
  free = GRID_R if delta is None else np.minimum(GRID_R, delta)
  want = -np.minimum(free * GRID_A, np.clip(GRID_R, 0.8, 1.28) * GRID_A)
  if dual is not None:
    want = np.where(GRID_A < 0, np.minimum(want, -dual * GRID_A), want)
  np.testing.assert_allclose(value, want, rtol=1e-5)


@pytest.mark.parametrize('dual', [None, 3.0, 10.0])
def test_gradient_is_zero_exactly_where_the_table_says(dual):
  _, grad = value_and_grad(**CLIP, dual_clip=dual)
  r, a = GRID_R, GRID_A
  live = ((a > 0) & (r < 1.28)) | ((a < 0) & (r > 0.8) & (r <= (dual or np.inf)))
  np.testing.assert_array_equal(np.asarray(grad) != 0, live)
  np.testing.assert_allclose(grad, np.where(live, -a * r, 0), rtol=1e-5)


def test_delta_stops_the_gradient_of_a_huge_ratio_only():
  _, grad = value_and_grad(**CLIP, delta=4.0)
  live = ((GRID_A > 0) & (GRID_R < 1.28)) | ((GRID_A < 0) & (GRID_R > 0.8) & (GRID_R < 4))
  np.testing.assert_array_equal(np.asarray(grad) != 0, live)


def test_dual_clip_example():
  one = jnp.ones(1)
  loss = functools.partial(surrogates.clipped, jnp.log(12 * one), 0 * one, -one, **CLIP)
  np.testing.assert_allclose(loss(), [12], rtol=1e-6)
  np.testing.assert_allclose(loss(dual_clip=10.0), [10], rtol=1e-6)


def test_log_ratio_is_clamped_and_a_nan_is_not_hidden():
  logp, old = jnp.array([0.0, -500.0, jnp.nan]), jnp.array([-500.0, 0.0, 0.0])
  np.testing.assert_array_equal(surrogates.log_ratio(logp, old), [20, -20, np.nan])
  for a in (1.0, -1.0):
    loss = surrogates.clipped(logp, old, jnp.full(3, a), **CLIP, dual_clip=10.0)
    assert np.isfinite(loss[:2]).all() and np.isnan(loss[2])


def batch(seed=0, n=4, t=6):
  rng = np.random.default_rng(seed)
  logp, old = -rng.exponential(size=(2, n, t)).astype(np.float32)
  mask = np.arange(t) < np.array([6, 3, 1, 4])[:, None]
  adv = np.where(mask, rng.normal(size=(n, 1)), 0).astype(np.float32)
  zero = lambda x: jnp.where(mask, x, 0)
  return zero(logp), zero(old), jnp.array(adv), jnp.array(mask)


SURROGATES = {
  'ppo': lambda lp, old, a, m: surrogates.clipped(lp, old, a, eps_low=0.2, eps_high=0.2),
  'dapo': lambda lp, old, a, m: surrogates.clipped(lp, old, a, **CLIP, dual_clip=10.0),
  'cispo': lambda lp, old, a, m: surrogates.cispo(lp, old, a, w_max=5.0),
  'gspo': lambda lp, old, a, m: surrogates.gspo(lp, old, a, m, eps_low=3e-4, eps_high=4e-4),
  'reinforce': lambda lp, old, a, m: surrogates.reinforce(lp, a),
}


def total(token_loss, mask, mode):
  num, den = aggregate.aggregate(token_loss, mask, mode, max_tokens=6)
  return num / den


PAIRS = [(name, mode) for name in ('ppo', 'dapo', 'cispo') for mode in aggregate.MODES]


@pytest.mark.parametrize('name, mode', [*PAIRS, ('gspo', 'seq_mean_token_mean')])
@pytest.mark.parametrize('explicit', [True, False])
def test_on_policy_every_surrogate_has_the_gradient_of_reinforce(name, mode, explicit):
  logp, _, adv, mask = batch()
  old = logp if explicit else None
  fns = (SURROGATES[name], SURROGATES['reinforce'])
  loss = lambda x, fn: total(fn(x, old, adv, mask), mask, mode)
  got, want = jax.jit(lambda x: [jax.grad(loss)(x, fn) for fn in fns])(logp)
  assert np.abs(want).max() > 0.01
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_on_policy_clips_nothing():
  logp, _, adv, mask = batch()
  for old in (logp, None):
    out = surrogates.clip_fractions(logp, old, adv, mask, **CLIP, dual_clip=10.0)
    for key in ('clip_frac_low', 'clip_frac_high', 'clip_frac_dual', 'approx_kl'):
      assert out[key][0] == 0
    assert out['ratio_mean'][0] == out['ratio_mean'][1] == mask.sum()
    assert surrogates.ratio_max(logp, old, mask) == 1


def test_clip_fractions_count_tokens_and_add_over_shards():
  ratio = jnp.array([[0.5, 1.5, 20.0, 1.0], [2.0, 0.7, 0.1, 50.0]])
  adv = jnp.array([[-1.0, 1.0, -1.0, 1.0], [1.0, 1.0, -1.0, -1.0]])
  mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
  fn = jax.jit(functools.partial(surrogates.clip_fractions, **CLIP, dual_clip=10.0))
  whole = fn(jnp.log(ratio), 0 * ratio, adv, mask)
  sums = {k: float(v[0]) for k, v in whole.items()}
  assert (sums['clip_frac_low'], sums['clip_frac_high'], sums['clip_frac_dual']) == (1, 2, 1)
  np.testing.assert_allclose(sums['ratio_mean'], 25.7, rtol=1e-6)
  np.testing.assert_allclose(sums['approx_kl'], -np.log(0.5 * 1.5 * 20 * 2 * 0.7), rtol=1e-5)
  np.testing.assert_allclose(surrogates.ratio_max(jnp.log(ratio), 0 * ratio, mask), 20, rtol=1e-5)
  row = lambda i: (jnp.log(ratio[i : i + 1]), jnp.zeros((1, 4)), adv[i : i + 1], mask[i : i + 1])
  parts = [fn(*row(0)), fn(*row(1))]
  added = jax.tree.map(lambda a, b: a + b, *parts)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), added, whole)


@pytest.mark.parametrize('seed', range(3))
def test_gspo_token_form_equals_the_sequence_form(seed):
  logp, old, adv, mask = batch(seed)
  old = logp - (logp - old) * 1e-3  # ratios near the bounds: some rows clip, some do not
  eps = dict(eps_low=3e-4, eps_high=4e-4)

  def sequence(x):
    s = jnp.exp((jnp.where(mask, x - old, 0)).sum(1) / mask.sum(1))
    a = adv[:, 0]
    return -jnp.minimum(s * a, jnp.clip(s, 1 - 3e-4, 1 + 4e-4) * a).mean()

  token = lambda x: total(surrogates.gspo(x, old, adv, mask, **eps), mask, 'seq_mean_token_mean')
  both = jax.jit(lambda x: [jax.value_and_grad(fn)(x) for fn in (sequence, token)])
  (v1, g1), (v2, g2) = both(logp)
  np.testing.assert_allclose(v1, v2, rtol=1e-5)
  np.testing.assert_allclose(g1, g2, atol=1e-6)
  assert 0 < np.count_nonzero(np.abs(g2).sum(1)) <= 4


def test_cispo_bounds_the_weight_and_drops_no_token():
  logp, old = jnp.log(jnp.array([0.01, 1.0, 30.0])), jnp.zeros(3)
  grad = lambda **k: jax.grad(lambda x: surrogates.cispo(x, old, jnp.ones(3), **k).sum())(logp)
  np.testing.assert_allclose(grad(w_max=5.0), [-0.01, -1, -5], rtol=1e-5)
  np.testing.assert_allclose(grad(w_min=0.5, w_max=5.0), [-0.5, -1, -5], rtol=1e-5)


@pytest.mark.parametrize('name', sorted(SURROGATES))
def test_only_logp_carries_a_gradient(name):
  logp, old, adv, mask = batch()
  fn = lambda old, adv: SURROGATES[name](logp, old, adv, mask).sum()
  for g in jax.grad(fn, argnums=(0, 1))(old, adv):
    np.testing.assert_array_equal(g, 0)


@pytest.mark.parametrize('name', sorted(SURROGATES))
def test_nan_outside_the_mask_changes_neither_value_nor_gradient(name):
  logp, old, adv, mask = batch()

  @jax.jit
  def loss(logp, old, adv):
    if name != 'gspo':  # the caller's part: zero before any exp or product
      logp, old, adv = (jnp.where(mask, x, 0) for x in (logp, old, adv))
    return total(SURROGATES[name](logp, old, adv, mask), mask, 'seq_mean_token_mean')

  bad = [jnp.where(mask, x, jnp.nan) for x in (logp, old, adv)]
  clean, dirty = jax.value_and_grad(loss)(logp, old, adv), jax.value_and_grad(loss)(*bad)
  jax.tree.map(np.testing.assert_array_equal, clean, dirty)
  assert np.isfinite(dirty[0]) and np.isfinite(dirty[1]).all()
  np.testing.assert_array_equal(dirty[1][~mask], 0)
  if name in ('dapo', 'gspo'):
    with jax.disable_jit():
      np.testing.assert_allclose(loss(*bad), clean[0], rtol=1e-6)


def test_metrics_ignore_nan_outside_the_mask():
  logp, old, adv, mask = batch()
  bad = [jnp.where(mask, x, jnp.nan) for x in (logp, old, adv)]
  fn = functools.partial(surrogates.clip_fractions, **CLIP, dual_clip=10.0)
  jax.tree.map(np.testing.assert_array_equal, fn(logp, old, adv, mask), fn(*bad, mask))
  clean = surrogates.ratio_max(logp, old, mask)
  np.testing.assert_array_equal(surrogates.ratio_max(*bad[:2], mask), clean)


def test_value_loss_is_pessimistic_and_clipped():
  old, ret = jnp.zeros(4), jnp.array([1.0, 1.0, -1.0, 0.0])
  value = jnp.array([0.1, 0.5, 0.5, 0.5])
  fn = lambda v: surrogates.value_loss(v, old, ret, clip=0.2)
  near = np.clip(value, -0.2, 0.2)
  want = 0.5 * np.maximum((value - ret) ** 2, (near - ret) ** 2)
  np.testing.assert_allclose(fn(value), want, rtol=1e-6)
  grad = jax.grad(lambda v: fn(v).sum())(value)
  np.testing.assert_allclose(grad, [-0.9, 0, 1.5, 0.5], rtol=1e-6)  # 2nd: clipped side is larger
  np.testing.assert_allclose(surrogates.value_loss(value, old, ret), 0.5 * (value - ret) ** 2)
  data = lambda o, r: surrogates.value_loss(value, o, r, clip=0.2).sum()
  for g in jax.grad(data, argnums=(0, 1))(old, ret):
    np.testing.assert_array_equal(g, 0)


@pytest.mark.parametrize(
  'args, message',
  [
    ((0.0, 0.2, None), r'eps_low must be in \(0, 1\), got 0.0'),
    ((1.0, 0.2, None), r'eps_low must be in \(0, 1\), got 1.0'),
    ((0.2, 0.0, None), r'eps_high must be > 0, got 0.0'),
    ((0.2, 0.2, 1.0), r'dual_clip must be > 1 or None, got 1.0'),
    ((float('nan'), 0.2, None), r'eps_low .* got nan'),
    ((0.2, float('nan'), None), r'eps_high .* got nan'),
  ],
)
def test_bad_clip_bounds_are_named(args, message):
  with pytest.raises(ValueError, match=message):
    surrogates.check_clip(*args)


def test_bad_weights_are_named():
  x = jnp.zeros(1)
  with pytest.raises(ValueError, match=r'w_min must be in \[0, w_max=2.0\), got 3.0'):
    surrogates.cispo(x, x, x, w_min=3.0, w_max=2.0)
  with pytest.raises(ValueError, match='clip must be > 0 or None, got 0.0'):
    surrogates.value_loss(x, x, x, clip=0.0)


def test_log_probs_of_another_shape_do_not_broadcast():
  wide = jnp.zeros((2, 3))
  for call in (lambda old: surrogates.clipped(wide, old, wide, eps_low=.2, eps_high=.2),
               lambda old: surrogates.gspo(wide, old, wide, wide > -1, eps_low=.2, eps_high=.2)):
    with pytest.raises(ValueError, match=r'old_logp .*\(2, 3\), got \(2, 1\)'):
      call(wide[:, :1])
