"""Block-table attention as it is written: every score at once, in float64 or float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def block_attention(query: Array, key: Array, value: Array, table: Array, *, block: int,
                    query_tile: int, budget: Array, segment_ids: Array, scale: float) -> Array:
  """Arguments as `block_table.block_attention` prepares them."""
  wide = jnp.promote_types(query.dtype, jnp.float32)
  heads, time = query.shape[2], query.shape[1]
  key, value = (jnp.repeat(x.astype(wide), heads // key.shape[2], axis=2) for x in (key, value))
  table = jnp.repeat(table, heads // table.shape[1], axis=1)
  t, s = jnp.arange(time)[:, None], jnp.arange(time)[None]
  listed = jnp.zeros((*table.shape[:2], time, time), bool)
  for rank in range(table.shape[3]):
    entry = jnp.repeat(table[..., rank], query_tile, axis=2)[:, :, :time]
    counts = rank < budget[:, None, None, None]
    listed |= counts & (entry[..., None] == s // block)
  own = s // block >= t // query_tile * query_tile // block
  same = (segment_ids[:, :, None] == segment_ids[:, None]) & (segment_ids != 0)[:, None]
  seen = (listed | own) & (s <= t) & same[:, None]
  scores = scale * jnp.einsum('bthk,bshk->bhts', query.astype(wide), key,
                              precision=lax.Precision.HIGHEST)
  some = jnp.any(seen, axis=-1, keepdims=True)
  weights = jax.nn.softmax(jnp.where(seen, scores, jnp.where(some, -jnp.inf, 0)), axis=-1)
  return jnp.einsum('bhts,bshv->bthv', jnp.where(some, weights, 0), value,
                    precision=lax.Precision.HIGHEST).astype(query.dtype)
