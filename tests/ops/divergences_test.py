"""Identities I1-I7, I12-I14 of distillation-baselines.md in float64, and its numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax.ops import divergences

STATIC = ('kind', 'beta', 'alpha', 'temperature', 'scale_by_tau2')
divergence = jax.jit(divergences.token_divergence, static_argnames=STATIC)
P3, Q3 = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
LP3, LQ3 = np.log(P3), np.log(Q3)


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def pair(seed=0, v=6, scale=1.5):
  z, s = np.random.default_rng(seed).normal(size=(2, v)) * scale
  return z, s


def softmax(z):
  z = np.exp(np.asarray(z) - np.max(z))
  return z / z.sum()


def probs(z, s, tau=1.0):
  return softmax(z / tau), softmax(s / tau)


def d3(kind, **kwargs):
  return divergence(LQ3, LP3, kind, **kwargs)


def test_printed_numbers(x64):
  np.testing.assert_allclose(d3('fkl'), 0.223804657, atol=5e-10)
  np.testing.assert_allclose(d3('rkl'), 0.193794198, atol=5e-10)
  for beta, want in ((0.1, 0.019661226), (0.5, 0.050874613), (0.9, 0.017562598)):
    np.testing.assert_allclose(d3('gjsd', beta=beta), want, atol=5e-10)
  grad = jax.grad(lambda z: divergence(z, LP3, 'rkl'))(LQ3)
  np.testing.assert_allclose(grad, [-0.222016992, 0.158515713, 0.063501278], atol=5e-10)
  p, q = np.log([0.7, 0.2, 0.1]), np.log([0.1, 0.3, 0.6])
  np.testing.assert_allclose(divergence(q, p, 'gjsd'), 0.230645, atol=5e-7)


def analytic_gradient(kind, q, p, beta):
  d = np.log(q) - np.log(p)
  if kind == 'fkl':
    return q - p
  if kind == 'rkl':
    return q * (d - (q * d).sum())
  u = np.log(q) - np.log(beta * p + (1 - beta) * q)
  return (1 - beta) * q * (u - (q * u).sum())


@pytest.mark.parametrize('kind, beta', [('fkl', 0.5), ('rkl', 0.5), ('gjsd', 0.3), ('gjsd', 0.5)])
def test_gradients_i1_i2_i3(x64, kind, beta):
  for seed in range(3):
    z, s = pair(seed)
    q, p = probs(z, s)
    grad = jax.grad(functools.partial(divergence, kind=kind, beta=beta))(z, s)
    np.testing.assert_allclose(grad, analytic_gradient(kind, q, p, beta), atol=1e-12)
    np.testing.assert_allclose(grad.sum(), 0, atol=1e-12)


def test_one_hot_teacher_is_cross_entropy_i4(x64):
  z, _ = pair()
  onehot = np.where(np.arange(6) == 2, 0.0, -np.inf)
  fn = lambda z: divergence(z, onehot, 'fkl')
  value, grad = jax.value_and_grad(fn)(z)
  q = softmax(z)
  np.testing.assert_allclose(value, -np.log(q[2]), atol=1e-12)
  np.testing.assert_allclose(grad, q - np.eye(6)[2], atol=1e-12)


def test_jsd_endpoints_i5(x64):
  z, s = pair()
  fn = functools.partial(divergence, z, s)
  for b in (1e-5, 1e-6):
    np.testing.assert_allclose(fn('gjsd', beta=b) / b, fn('fkl'), rtol=20 * b)
    np.testing.assert_allclose(fn('gjsd', beta=1 - b) / b, fn('rkl'), rtol=20 * b)
  assert fn('gjsd', beta=1e-6) < 1e-5 < fn('gjsd', beta=0.0)
  np.testing.assert_array_equal(fn('gjsd', beta=0.0), fn('fkl'))
  np.testing.assert_array_equal(fn('gjsd', beta=1), fn('rkl'))


def test_temperature_i6_and_its_limit_i7(x64):
  z, s = pair()
  fn = functools.partial(divergence, kind='fkl')
  q, p = probs(z, s, 2.5)
  grad = jax.grad(lambda z: fn(z, s, temperature=2.5))(z)
  np.testing.assert_allclose(grad, (q - p) / 2.5, atol=1e-12)
  hot = lambda z: fn(z, s, temperature=1e4, scale_by_tau2=True)
  zc, sc = z - z.mean(), s - s.mean()
  value, grad = jax.value_and_grad(hot)(z)
  np.testing.assert_allclose(value, ((zc - sc) ** 2).sum() / 12, rtol=1e-3)
  np.testing.assert_allclose(grad, (zc - sc) / 6, atol=1e-4)
  scaled = fn(z, s, temperature=2.0, scale_by_tau2=True)
  np.testing.assert_allclose(scaled, 4 * fn(z, s, temperature=2.0), rtol=1e-12)


def test_jsd_is_symmetric_bounded_and_zero_iff_equal(x64):
  for seed in range(20):
    z, s = pair(seed, scale=8.0)
    fn = lambda a, b: divergence(a, b, 'gjsd')
    assert 0 < fn(z, s) <= np.log(2)
    np.testing.assert_allclose(fn(z, s), fn(s, z), atol=1e-12)
    assert abs(fn(z, z + 3.0)) < 1e-12
  far = divergence(jnp.array([500.0, 0.0]), jnp.array([0.0, 500.0]), 'gjsd')
  np.testing.assert_allclose(far, np.log(2), atol=1e-12)
  skew = lambda a, b: divergence(a, b, 'gjsd', beta=0.2)
  bound = -(0.2 * np.log(0.2) + 0.8 * np.log(0.8))
  assert skew(z, s) <= bound and abs(skew(z, s) - skew(s, z)) > 1e-3


def test_skewed_kinds_by_their_formula(x64):
  mix = 0.1 * P3 + 0.9 * Q3
  np.testing.assert_allclose(d3('skew_fkl'), (P3 * np.log(P3 / mix)).sum(), atol=1e-12)
  mix = 0.9 * P3 + 0.1 * Q3
  np.testing.assert_allclose(d3('skew_rkl'), (Q3 * np.log(Q3 / mix)).sum(), atol=1e-12)
  np.testing.assert_array_equal(d3('skew_fkl', alpha=0.0), d3('fkl'))
  np.testing.assert_array_equal(d3('skew_rkl', alpha=0.0), d3('rkl'))


@pytest.mark.parametrize('kind', divergences.KINDS)
def test_no_gradient_into_the_teacher_and_padded_ids_add_nothing(kind):
  z, s = (x.astype(np.float32) for x in pair())
  fn = lambda z, s: divergence(z, s, kind)
  pad = lambda x: np.append(x, np.float32([-np.inf, -np.inf]))
  both = jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))
  (v1, (g1, t1)), (v2, (g2, t2)) = both(z, s), both(pad(z), pad(s))
  np.testing.assert_array_equal(t1, 0)
  np.testing.assert_array_equal(t2, 0)
  np.testing.assert_allclose(v1, v2, rtol=1e-6)
  np.testing.assert_allclose(pad(g1)[:6], g2[:6], atol=1e-6)
  np.testing.assert_array_equal(g2[6:], 0)
  if kind == 'gjsd':
    np.testing.assert_allclose(v1, divergences.token_divergence(z, s, kind), rtol=1e-5)


def test_extreme_logits_stay_finite():
  z, s = np.float32([300, 0, -300]), np.float32([-200, 100, 0])
  both = jax.value_and_grad(divergences.token_divergence)
  out = jax.jit(lambda z, s: {kind: both(z, s, kind) for kind in divergences.KINDS})(z, s)
  for value, grad in out.values():
    assert np.isfinite(value) and np.isfinite(grad).all() and value > 0


HOT = dict(temperature=2.0, scale_by_tau2=True, num_valid=7)


@pytest.mark.parametrize('kind, options', [('rkl', {}), ('skew_fkl', {}), ('gjsd', HOT)])
def test_chunked_equals_whole(kind, options):
  rng = np.random.default_rng(0)
  shapes = [(2, 5, 4), (4, 9), (2, 5, 3), (3, 9)]
  hs, ws, ht, wt = (jnp.array(rng.normal(size=x), jnp.float32) for x in shapes)
  options = dict(options)
  num_valid = options.pop('num_valid', None)

  def whole(hs, ws, ht, wt):
    z, s = (hs @ ws)[..., :num_valid], (ht @ wt)[..., :num_valid]
    return divergence(z, s, kind, **options)

  def chunked(hs, ws, ht, wt):
    return divergences.divergence_chunked(
      hs, ws, ht, wt, kind, chunk=2, num_valid=num_valid, **options
    )

  weight = jnp.arange(10.0).reshape(2, 5)

  def run(fn):
    scalar = jax.value_and_grad(lambda *a: (fn(*a) * weight).sum(), argnums=(0, 1, 2, 3))
    return jax.jit(scalar)(hs, ws, ht, wt)

  want, got = run(whole), run(chunked)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
  for g in got[1][2:]:  # the teacher
    np.testing.assert_array_equal(g, 0)


def test_chunked_soft_caps_are_per_model():
  h, w = jnp.array([[[3.0, -2.0]]]), jnp.eye(2)
  got = divergences.divergence_chunked(
    h, w, 2 * h, w, 'rkl', chunk=1, logit_cap=1.0, teacher_logit_cap=4.0
  )
  want = divergence(jnp.tanh(h), 4 * jnp.tanh(2 * h / 4), 'rkl')
  np.testing.assert_allclose(got, want, rtol=1e-5)


# Sampled estimators.


def test_estimators_match_the_closed_form_over_200k_samples():
  lq, lp = np.log(Q3).astype(np.float32), np.log(P3).astype(np.float32)
  y = np.random.default_rng(0).choice(3, 200_000, p=Q3)
  exact = (Q3 * np.log(Q3 / P3)).sum()
  for kind in ('k1', 'k3'):
    k = np.asarray(divergences.kl_estimate(jnp.array(lq[y]), jnp.array(lp[y]), kind), np.float64)
    assert abs(k.mean() - exact) < 3 * k.std() / np.sqrt(len(k))
    assert k.std() > 0
  assert k.min() >= 0


EXPECTED = [('k1', 'zero'), ('k2', 'rkl'), ('k3', 'fkl'), ('k3+', 'rkl')]


@pytest.mark.parametrize('kind, want', EXPECTED)
def test_expected_gradients_of_the_estimators_i12(x64, kind, want):
  z, s = pair(v=4, scale=0.7)
  q, p = probs(z, s)

  def expected(x):  # y ~ q held fixed: enumerate it, weights outside the gradient
    return (q * divergences.kl_estimate(jax.nn.log_softmax(x), np.log(p), kind)).sum()

  grad = jax.jit(jax.grad(expected))(z)
  target = np.zeros(4) if want == 'zero' else analytic_gradient(want, q, p, 0.5)
  np.testing.assert_allclose(grad, target, atol=1e-12)


def test_k3_plus_value_clamps_and_reference_gradient():
  lp, ref = jnp.array([-1.0, -50.0, 0.0]), jnp.array([-1.3, 0.0, -50.0])
  est = functools.partial(divergences.kl_estimate, lp, ref)
  np.testing.assert_allclose(est('k1'), [0.3, -50, 50], rtol=1e-6)
  np.testing.assert_allclose(est('k2'), [0.045, 1250, 1250], rtol=1e-6)
  np.testing.assert_allclose(est('k3'), [np.exp(-0.3) - 0.7, 10, 10], rtol=1e-5)
  np.testing.assert_allclose(est('k3+'), est('k3'), rtol=1e-5, atol=1e-4)
  for kind in divergences.ESTIMATORS:
    g = jax.grad(lambda r: divergences.kl_estimate(lp, r, kind).sum())(ref)  # noqa: B023
    np.testing.assert_array_equal(g, 0)


def test_kl_full_is_reverse_kl(x64):
  np.testing.assert_allclose(divergences.kl_full(LQ3, LP3), 0.193794198, atol=5e-10)


# Top-k.


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def topk(kind, variant, z=LQ3, s=LP3, k=2):
  lp, ids = jax.lax.top_k(jax.nn.log_softmax(s), k)
  return divergences.topk_divergence(z, ids, lp, kind, variant)


def test_printed_top_k_numbers(x64):
  np.testing.assert_allclose(topk('fkl', 'trunc'), 0.304897679, atol=5e-10)
  np.testing.assert_allclose(topk('fkl', 'trunc_mean'), 0.152448839, atol=5e-10)
  np.testing.assert_allclose(topk('fkl', 'renorm'), 0.247590706, atol=5e-10)
  np.testing.assert_allclose(topk('rkl', 'renorm'), 0.236609486, atol=5e-10)
  np.testing.assert_allclose(topk('fkl', 'tail'), 0.223804657, atol=5e-10)
  np.testing.assert_allclose(topk('rkl', 'tail'), 0.193794198, atol=5e-10)


@pytest.mark.parametrize('variant', ['trunc', 'trunc_mean'])
def test_truncated_gradient_i13(x64, variant):
  z, s = pair()
  q, p = probs(z, s)
  inside = np.isin(np.arange(6), np.argsort(-p)[:3])
  grad = jax.grad(lambda z: topk('fkl', variant, z, s, 3))(z)
  want = p[inside].sum() * q - p * inside
  np.testing.assert_allclose(grad, want / (3 if variant == 'trunc_mean' else 1), atol=1e-12)


@pytest.mark.parametrize('kind', ['fkl', 'rkl', 'gjsd'])
def test_tail_bucket_is_a_lower_bound_exact_from_v_minus_one_i14(x64, kind):
  z, s = (np.stack(x) for x in zip(*(pair(seed) for seed in range(8))))
  full = lambda z: divergences.token_divergence(z, s, kind)
  tail = lambda z, k: topk(kind, 'tail', z, s, k)

  @jax.jit
  def everything(z):
    values = {k: tail(z, k) for k in (1, 3, 5, 6)}
    grads = [jax.grad(lambda z: full(z).sum())(z), jax.grad(lambda z: tail(z, 5).sum())(z)]
    return full(z), values, grads

  want, values, grads = everything(z)
  assert all((v <= want + 1e-12).all() for v in values.values())
  assert (values[1] < want - 1e-4).all()
  np.testing.assert_allclose(values[5], want, atol=1e-9)
  np.testing.assert_allclose(values[6], want, atol=1e-6)
  np.testing.assert_allclose(grads[1], grads[0], atol=1e-9)


@pytest.mark.parametrize('variant', divergences.VARIANTS)
@pytest.mark.parametrize('kind', ['fkl', 'rkl'])
def test_all_ids_reproduce_the_full_divergence(x64, kind, variant):
  z, s = pair()
  full = divergence(z, s, kind) / (6 if variant == 'trunc_mean' else 1)
  np.testing.assert_allclose(topk(kind, variant, z, s, 6), full, atol=1e-6)


def test_renormalised_is_blind_to_student_mass_elsewhere_the_tail_is_not(x64):
  s = np.log([0.6, 0.39, 0.005, 0.005])
  z = np.log([0.6e-6, 0.39e-6, 0.5, 0.5 - 0.99e-6])
  np.testing.assert_allclose(topk('rkl', 'renorm', z, s), 0, atol=1e-9)
  np.testing.assert_allclose(topk('fkl', 'renorm', z, s), 0, atol=1e-9)
  assert topk('rkl', 'tail', z, s) > 4 and topk('fkl', 'tail', z, s) > 10


def test_truncated_may_be_negative(x64):
  s, z = np.log([0.4, 0.35, 0.25]), np.log([0.5, 0.45, 0.05])
  assert topk('fkl', 'trunc', z, s) < 0 < topk('fkl', 'tail', z, s)


def test_top_k_teacher_has_no_gradient_and_a_peaked_float32_pair_is_finite():
  z, s = jnp.array([40.0, 0.0, -5.0, -60.0]), jnp.array([60.0, -1.0, 0.0, -80.0])
  lp, ids = jax.lax.top_k(jax.nn.log_softmax(s), 2)
  fn = lambda z, lp, variant: divergences.topk_divergence(z, ids, lp, 'fkl', variant)
  both = jax.value_and_grad(fn, argnums=(0, 1))
  out = jax.jit(lambda *a: {v: both(*a, v) for v in divergences.VARIANTS})(z, lp)
  for value, (gz, gt) in out.values():
    assert np.isfinite(value) and np.isfinite(gz).all()
    np.testing.assert_array_equal(gt, 0)


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: d3('kl'), "kind must be one of .* got 'kl'"),
    (lambda: d3('gjsd', beta=1.1), r'beta must be in \[0, 1\], got 1.1'),
    (lambda: d3('skew_fkl', alpha=1.0), r'alpha must be in \[0, 1\), got 1.0'),
    (lambda: d3('fkl', temperature=0.0), 'temperature must be > 0, got 0.0'),
    (lambda: divergence(jnp.zeros(3), jnp.zeros(4)), 'teacher_logits .* 3 .* 4'),
    (lambda: divergences.kl_estimate(jnp.zeros(1), jnp.zeros(1), 'k4'), "kind .* got 'k4'"),
    (lambda: divergences.check_kl_loss('k1'), "kind of a KL loss .* got 'k1'"),
    (lambda: topk('fkl', 'head'), "variant must be one of .* got 'head'"),
    (lambda: topk('gjsd', 'trunc'), "kind must be 'fkl' or 'rkl' .* got 'gjsd'"),
    (
      lambda: divergences.topk_divergence(jnp.zeros(3), jnp.zeros(4, int), jnp.zeros(4)),
      r'K = .* must be in \[1, 3\], got 4',
    ),
    (
      lambda: divergences.topk_divergence(jnp.zeros(3), jnp.zeros(0, int), jnp.zeros(0)),
      r'K = .* must be in \[1, 3\], got 0',
    ),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
