"""On-policy distillation credit: I11, its variance numbers, discounts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax.ops import credit, surrogates

P3, Q3 = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def sampled_gradients(kl_baseline=None):
  """Gradient of the loss in the logits for each sampled token y, f64[y, V]."""
  z, lp = jnp.log(jnp.array(Q3)), jnp.log(jnp.array(P3))

  def one(y):
    base = None if kl_baseline is None else jnp.full((1, 1), kl_baseline)

    def loss(x):
      lq = jax.nn.log_softmax(x)[y][None, None]
      mask = jnp.ones((1, 1), bool)
      a = credit.opd_advantage(lp[y][None, None], lq, mask, kl_baseline=base)
      return surrogates.reinforce(lq, a).sum()

    return jax.grad(loss)(z)

  return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(3)))


def trace(g):
  mean = Q3 @ g
  return (Q3 * (g**2).sum(1)).sum() - (mean**2).sum()


def test_sampled_gradient_is_unbiased_for_reverse_kl_i11(x64):
  d = np.log(Q3 / P3)
  kl = (Q3 * d).sum()
  for baseline in (None, kl, 0.019908):
    mean = Q3 @ sampled_gradients(baseline)
    np.testing.assert_allclose(mean, Q3 * (d - kl), atol=1e-12)
  np.testing.assert_allclose(mean, [-0.222016992, 0.158515713, 0.063501278], atol=5e-10)


def test_the_kl_baseline_raises_the_variance_here(x64):
  kl = (Q3 * np.log(Q3 / P3)).sum()
  np.testing.assert_allclose(trace(sampled_gradients()), 0.174157, atol=5e-7)
  np.testing.assert_allclose(trace(sampled_gradients(kl)), 0.192658, atol=5e-7)
  np.testing.assert_allclose(trace(sampled_gradients(0.019908)), 0.173912, atol=5e-7)


MASK = np.array([[1, 0, 1, 1], [0, 1, 1, 0]], bool)
VALUE = np.where(MASK, np.array([[1.0, 9, 2, 4], [9, 3, 5, 9]]), np.nan).astype(np.float32)


def test_reward_to_go_skips_masked_tokens_and_is_relative():
  got = credit.reward_to_go(VALUE, MASK, discount=0.5)
  np.testing.assert_allclose(got, [[1 + 0.5 * 4, 0, 4, 4], [0, 5.5, 5, 0]])
  now = credit.reward_to_go(VALUE, MASK, discount=0.0)
  np.testing.assert_array_equal(now, np.where(MASK, VALUE, 0))
  ones = credit.reward_to_go(VALUE, MASK, discount=1.0)
  np.testing.assert_allclose(ones, [[7, 0, 6, 4], [0, 8, 5, 0]])


def test_length_norm_divides_by_the_discounted_length():
  got = credit.reward_to_go(VALUE, MASK, discount=0.5, length_norm=True)
  np.testing.assert_allclose(got, [[3 / 1.75, 0, 4 / 1.5, 4], [0, 5.5 / 1.5, 5, 0]], rtol=1e-6)
  three = np.float32([[1, 2, 6]])  # g = 1, T = 3 by hand
  got = credit.reward_to_go(three, np.ones((1, 3), bool), discount=1.0, length_norm=True)
  np.testing.assert_allclose(got, [[3, 4, 6]])


def test_opd_advantage_clip_discount_baseline_and_nan_outside_the_mask():
  teacher = np.where(MASK, [[-1.0, 0, -5, -2], [0, -3, -1, 0]], np.nan)
  old = np.where(MASK, [[-2.0, 0, -1, -2.5], [0, -1, -1, 0]], np.nan)
  fn = jax.jit(credit.opd_advantage, static_argnames=('discount', 'clip'))
  np.testing.assert_allclose(fn(teacher, old, MASK), [[1, 0, -4, 0.5], [0, -2, 0, 0]])
  np.testing.assert_allclose(
    fn(teacher, old, MASK, clip=(-1.5, 0.75)), [[0.75, 0, -1.5, 0.5], [0, -1.5, 0, 0]]
  )
  np.testing.assert_allclose(
    fn(teacher, old, MASK, discount=0.5), [[1 - 1.875, 0, -3.75, 0.5], [0, -2, 0, 0]]
  )
  base = np.where(MASK, 0.25, np.nan)
  np.testing.assert_allclose(
    fn(teacher, old, MASK, kl_baseline=base), [[1.25, 0, -3.75, 0.75], [0, -1.75, 0.25, 0]]
  )
  np.testing.assert_allclose(credit.opd_advantage(teacher, old, MASK), fn(teacher, old, MASK))


def test_a_forbidding_teacher_is_floored_and_nothing_is_differentiated():
  one = jnp.ones((1, 1))
  a = credit.opd_advantage(-jnp.inf * one, -one, one)
  np.testing.assert_allclose(a, np.log(1e-30) + 1, rtol=1e-6)
  for g in jax.grad(lambda *x: credit.opd_advantage(*x, one).sum(), argnums=(0, 1))(-one, -2 * one):
    np.testing.assert_array_equal(g, 0)


@pytest.mark.parametrize(
  'kwargs, message',
  [
    (dict(discount=1.5), r'discount must be in \[0, 1\], got 1.5'),
    (dict(clip=(1.0, -1.0)), r'clip must be \(low, high\).* got \(1.0, -1.0\)'),
  ],
)
def test_bad_input_is_named(kwargs, message):
  with pytest.raises(ValueError, match=message):
    credit.opd_advantage(VALUE, VALUE, MASK, **kwargs)
