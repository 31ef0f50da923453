"""Logit rules: pure maps of logits f32[N, V] applied before sampling: penalties, then `apply`.

Top-k keeps values >= the k-th largest; top-p keeps the tokens whose strictly better ones hold less
than p (the best token always stays); min-p keeps p_i >= min_p * max p. A rule that is off is the
identity, bit for bit.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
DROPPED = -1e30


def top_k(logits: Array, k: int) -> Array:
  """Drops everything below the k-th largest logit; k = 0 keeps all."""
  if k <= 0 or k >= logits.shape[-1]:
    return logits
  kth = jax.lax.top_k(logits, k)[0][..., -1:]
  return jnp.where(logits >= kth, logits, DROPPED)


def top_p(logits: Array, p: float) -> Array:
  """Keeps the smallest set of best tokens whose mass reaches p; p = 1 keeps all."""
  if p >= 1:
    return logits
  order = jnp.argsort(logits, axis=-1, descending=True)
  probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
  keep_sorted = jnp.cumsum(probs, axis=-1) - probs < p
  keep = jnp.take_along_axis(keep_sorted, jnp.argsort(order, axis=-1), axis=-1)
  return jnp.where(keep, logits, DROPPED)


def min_p(logits: Array, p: float) -> Array:
  """Drops tokens less likely than p times the best one; p = 0 keeps all."""
  if p <= 0:
    return logits
  floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)
  return jnp.where(logits >= floor, logits, DROPPED)


def penalise(logits: Array, counts: Array, prompt: Array, *, presence: float, frequency: float,
             repetition: float) -> Array:
  """Discourages tokens that the row holds already; 0, 0 and 1 change nothing.

  z / repetition for z > 0, else z * repetition, for tokens of the prompt (bool[N, V]) or response
  (counts i32[N, V]), then z - frequency * count - presence * [count > 0].
  """
  turned = jnp.where(logits > 0, logits / repetition, logits * repetition)
  logits = jnp.where((counts > 0) | prompt, turned, logits)
  return logits - frequency * counts - presence * (counts > 0)


def apply(logits: Array, *, temperature: float, k: int, p: float, floor: float) -> Array:
  """Temperature, then top-k, top-p, min-p: the logits of the distribution actually sampled."""
  return min_p(top_p(top_k(logits / temperature, k), p), floor)
