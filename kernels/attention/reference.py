"""The law: every score at once, in float64 or float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def attention(query: Array, key: Array, value: Array, *, segment_ids: Array, scale: float,
              window: int, cap: float | None) -> Array:
  """Arguments as `api.attention` prepares them."""
  wide = jnp.promote_types(query.dtype, jnp.float32)
  repeats = query.shape[2] // key.shape[2]
  key, value = (jnp.repeat(x.astype(wide), repeats, axis=2) for x in (key, value))
  scores = scale * jnp.einsum('bthk,bshk->bhts', query.astype(wide), key)
  if cap is not None:
    scores = cap * jnp.tanh(scores / cap)
  t, s = jnp.mgrid[:query.shape[1], :query.shape[1]]
  seen = (s <= t) & ((s > t - window) if window else True)
  seen = seen[None] & (segment_ids[:, :, None] == segment_ids[:, None])
  weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
  return jnp.einsum('bhts,bshv->bthv', weights, value).astype(query.dtype)
