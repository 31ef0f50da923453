"""Chunked log-probs equal the naive ones, in value and gradient, without the whole logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax.ops import logprobs

B, T, D, V = 2, 7, 5, 11
RNG = np.random.default_rng(0)
HIDDEN = jnp.array(RNG.normal(size=(B, T, D)), jnp.float32)
UNEMBED = jnp.array(RNG.normal(size=(D, V)), jnp.float32)
TARGETS = jnp.array(RNG.integers(0, V - 2, (B, T)))


def naive(hidden, unembed, targets, *, temperature=1.0, logit_cap=None, num_valid=None):
  """Written apart from the library: plain log_softmax over the valid part of the vocabulary."""
  z = hidden @ unembed
  z = z if logit_cap is None else logit_cap * jnp.tanh(z / logit_cap)
  lp = jax.nn.log_softmax(z[..., :num_valid] / temperature)
  chosen = jnp.take_along_axis(lp, targets[..., None], -1)[..., 0]
  return chosen, -(jnp.exp(lp) * lp).sum(-1)


ALL = dict(logit_cap=2.0, temperature=1.3, num_valid=V - 2)
CASES = [(1, {}), (64, {}), (3, dict(temperature=0.7)), (3, ALL)]


@pytest.mark.parametrize('chunk, options', CASES)
def test_value_and_gradient_equal_the_naive_ones(chunk, options):
  def both(fn):
    def scalar(h, w):
      lp, ent = fn(h, w, TARGETS, **options)
      return (lp * jnp.arange(T)).sum() + 0.3 * (ent**2).sum(), (lp, ent)

    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))(HIDDEN, UNEMBED)

  got = both(functools.partial(logprobs.logprobs_chunked, chunk=chunk))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, both(naive)
  )
  assert got[0][1][0].shape == (B, T)


def test_logits_reference_agrees():
  got = jax.jit(lambda h, w, y: logprobs.logprobs(h @ w, y))(HIDDEN, UNEMBED, TARGETS)
  want = jax.jit(naive)(HIDDEN, UNEMBED, TARGETS)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_a_padded_id_is_impossible_and_poisons_nothing():
  padded = TARGETS.at[0, 2].set(V - 1)

  def loss(h):
    lp, ent = logprobs.logprobs_chunked(h, UNEMBED, padded, chunk=4, num_valid=V - 2)
    return jnp.where(padded < V - 2, lp, 0).sum() + ent.sum(), (lp, ent)

  grad, (lp, ent) = jax.jit(jax.grad(loss, has_aux=True))(HIDDEN)
  np.testing.assert_array_equal(np.isneginf(lp), padded == V - 1)
  assert np.isfinite(ent).all() and np.isfinite(grad).all()


def test_log_probs_sum_to_one_over_the_vocabulary():
  every = jnp.arange(V)
  fn = lambda y: logprobs.logprobs_chunked(HIDDEN, UNEMBED, jnp.full((B, T), y), chunk=3)
  lp, _ = jax.jit(jax.vmap(fn))(every)
  np.testing.assert_allclose(jnp.exp(lp).sum(0), 1, rtol=1e-5)


def test_flat_and_deeper_leading_axes():
  @jax.jit
  def all_ranks(h, y):
    pairs = ((h, y), (h[0], y[0]), (h[:, None], y[:, None]))
    return [logprobs.logprobs_chunked(a, UNEMBED, b, chunk=3)[0] for a, b in pairs]

  want, flat, deep = all_ranks(HIDDEN, TARGETS)
  np.testing.assert_allclose(flat, want[0], rtol=1e-5)
  np.testing.assert_allclose(deep[:, 0], want, rtol=1e-5)


def test_bfloat16_inputs_are_reduced_in_float32():
  h, w = HIDDEN.astype(jnp.bfloat16), UNEMBED.astype(jnp.bfloat16)
  lp, ent = logprobs.logprobs_chunked(h, w, TARGETS, chunk=3)
  assert lp.dtype == ent.dtype == jnp.float32
  want, _ = jax.jit(naive)(h.astype(jnp.float32), w.astype(jnp.float32), TARGETS)
  np.testing.assert_allclose(lp, want, atol=1e-4)


def largest_array(jaxpr) -> int:
  sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, 'size')]
  inner = [x for eqn in jaxpr.eqns for x in eqn.params.values()]
  for x in inner:
    x = getattr(x, 'jaxpr', x)
    if hasattr(x, 'eqns'):
      sizes.append(largest_array(x))
  return max(sizes, default=0)


def test_the_whole_logits_never_exist_not_even_in_the_backward_pass():
  d, v, t = 4, 512, 64
  args = (jnp.ones((2, t, d)), jnp.ones((d, v)))
  y = jnp.zeros((2, t), jnp.int32)

  def largest(chunk):
    loss = lambda h, w: sum(
      x.sum() for x in logprobs.logprobs_chunked(h, w, y, chunk=chunk)
    )
    return largest_array(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*args).jaxpr)

  assert largest(t) == 2 * t * v  # the probe sees the logits when they are all there
  assert largest(8) == 2 * 8 * v


def test_bad_input_is_named():
  with pytest.raises(ValueError, match='temperature must be > 0, got 0.0'):
    logprobs.logprobs_chunked(HIDDEN, UNEMBED, TARGETS, chunk=3, temperature=0.0)
  with pytest.raises(ValueError, match='chunk must be >= 1, got 0'):
    logprobs.logprobs_chunked(HIDDEN, UNEMBED, TARGETS, chunk=0)
