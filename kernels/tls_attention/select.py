"""Sets of the k largest scores, ties by the lowest index: in rising order, padded behind.

Found bit by bit, as a radix selection: a few passes over the scores, where a sort or `lax.top_k` of
1024 in 8192 costs more than exact attention over the result.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels.common import dispatch
from kernels.tls_attention import tpu_select

Array = jax.Array


def _ordered(scores: Array) -> Array:
  """u32 whose order is that of float32, -inf lowest; -0.0 and subnormal numbers count as 0."""
  bits = lax.bitcast_convert_type(scores.astype(jnp.float32) + 0.0, jnp.int32)
  return lax.bitcast_convert_type(bits ^ ((bits >> 31) | jnp.int32(-2**31)), jnp.uint32)


def in_top(scores: Array, k: int) -> Array:
  """bool[..., n], true at the k largest of f[..., n]; -inf is never among them."""
  return dispatch.run('in_top', _IN_TOP, None, tuple(_IN_TOP), scores, k)


def by_bits(scores: Array, k: int) -> Array:
  """`in_top` as XLA operations."""
  values = _ordered(scores)

  def step(i, carry):
    # Only in here are the values compared, so they are computed once: a program may compute the
    # scores for another use again with another rounding, and a k-th value would equal none of them.
    alive, taken, left = carry
    ones = alive & ((values >> (31 - i).astype(jnp.uint32)) & 1 > 0)
    count = jnp.sum(ones, axis=-1, keepdims=True)
    many = count >= left
    return (jnp.where(many, ones, alive & ~ones), taken | (ones & ~many),
            jnp.where(many, left, left - count))

  live = scores > -jnp.inf
  start = live, jnp.zeros_like(live), jnp.full((*scores.shape[:-1], 1), k)
  alive, taken, left = lax.fori_loop(0, 32, step, start)
  return taken | (alive & (jnp.cumsum(alive, axis=-1) <= left))


_IN_TOP = {'pallas_tpu': tpu_select.in_top, 'by_bits': by_bits}


def compact(mask: Array, k: int) -> Array:
  """Indices i32[..., k] of the true entries of bool[..., n], in rising order; n = none."""
  if dispatch.platform() == 'tpu':
    return tpu_select.compact(mask, k)
  n = mask.shape[-1]
  place = jnp.cumsum(mask, axis=-1)

  def find(row):  # the first entry with j true ones up to it
    return jnp.searchsorted(row, jnp.arange(1, k + 1))

  flat = place.reshape(-1, n)
  return jax.vmap(find)(flat).reshape(*mask.shape[:-1], k).astype(jnp.int32)


def top(scores: Array, k: int) -> Array:
  """Indices i32[..., k] of the k largest of f[..., n] in rising order; n where there are fewer."""
  n = scores.shape[-1]
  if k >= n:
    index = compact(scores > -jnp.inf, n)
    return jnp.pad(index, [(0, 0)] * (index.ndim - 1) + [(0, k - n)], constant_values=n)
  return compact(in_top(scores, k), k)
