"""Sets of the k largest scores, ties by the lowest index: in rising order, padded behind.

Found by the number of scores above a bound: a few passes over the scores, where a sort or
`lax.top_k` of 1024 in 8192 costs more than exact attention over the result.
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


def by_halves(scores: Array, k: int) -> Array:
  """`in_top` as XLA operations: the k-th value is looked for by bisection, of a row with ties at
  most 32 times.
  """
  values, live = _ordered(scores), scores > -jnp.inf
  count = lambda mask: jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)
  few = count(live) <= k
  least = jnp.min(jnp.where(live, values, jnp.uint32(2**32 - 1)), axis=-1, keepdims=True)
  low = jnp.where(few, _ordered(jnp.float32(-jnp.inf)) + 1, least)

  # Only in the loop are the values compared, so they are computed once: a program may compute the
  # scores for another use again with another rounding, and a k-th value would equal none of them.
  def step(carry):
    low, high, found, *_ = carry  # at least k values are not below `low`, fewer not below `high`

    def halve():
      middle = low + (high - low) // 2
      above = count(values >= middle)
      bottom = jnp.where(~found & (above >= k), middle, low)
      top_ = jnp.where(above >= k, high, middle)
      return bottom, top_, found | (above == k) | (top_ - bottom <= 1), *carry[3:]

    def finish():
      over, tie = values > low, values == low
      return low, high, found, over | (tie & (_running(tie) <= k - count(over))), True

    return lax.cond(jnp.all(found), finish, halve)

  start = (low, jnp.max(values, axis=-1, keepdims=True) + 1, few,
           jnp.zeros_like(live), False)
  return lax.while_loop(lambda carry: ~carry[-1], step, start)[3]


_IN_TOP = {'pallas_tpu': tpu_select.in_top, 'by_halves': by_halves}


def _running(mask: Array) -> Array:
  """True entries of bool[..., n] up to each, i32: products with a triangle, exact below 2**24."""
  n, width = mask.shape[-1], 64
  wide = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, -n % width)])
  wide = wide.reshape(*mask.shape[:-1], -1, width).astype(jnp.float32)
  inner = wide @ jnp.triu(jnp.ones((width, width), jnp.float32))
  before = jnp.cumsum(inner[..., -1:], axis=-2) - inner[..., -1:]
  return (inner + before).reshape(*mask.shape[:-1], -1)[..., :n].astype(jnp.int32)


def compact(mask: Array, k: int) -> Array:
  """Indices i32[..., k] of the true entries of bool[..., n], in rising order; n = none."""
  if dispatch.platform() == 'tpu':
    return tpu_select.compact(mask, k)
  n = mask.shape[-1]

  def find(row):  # the first entry with j true ones up to it
    return jnp.searchsorted(row, jnp.arange(1, k + 1))

  flat = _running(mask).reshape(-1, n)
  return jax.vmap(find)(flat).reshape(*mask.shape[:-1], k).astype(jnp.int32)


def top(scores: Array, k: int) -> Array:
  """Indices i32[..., k] of the k largest of f[..., n] in rising order; n where there are fewer."""
  n = scores.shape[-1]
  if k >= n:
    index = compact(scores > -jnp.inf, n)
    return jnp.pad(index, [(0, 0)] * (index.ndim - 1) + [(0, k - n)], constant_values=n)
  return compact(in_top(scores, k), k)
