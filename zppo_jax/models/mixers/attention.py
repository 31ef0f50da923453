"""Softmax attention, over all tokens or over a sliding window."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zppo_jax.mesh import axes
from zppo_jax.models import layers
from zppo_jax.models.cache import KV_AXES, KeyValue
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.mixers.place import Place

Array = jax.Array


def attention(sliding: bool, config: ModelConfig, params, x: Array, place: Place,
              cache: KeyValue | None, layer, prefix: KeyValue | None = None
              ) -> tuple[Array, KeyValue | None]:
  """Causal grouped-query attention with rotary positions; QK-norm and gate where the config says
  so. x [B, T, D]; `sliding` sees the last config.window keys, its own included."""
  query, key, value = (layers.project(x, w) for w in (params.query, params.key, params.value))
  if config.qk_norm:
    query = layers.norm(config, query, params.query_norm)
    key = layers.norm(config, key, params.key_norm)
  query = layers.rope(config, query, place.positions)
  key = layers.rope(config, key, place.positions)
  key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)  # [B, KV, T, K]
  window = config.window if sliding else 0
  mask_of = masks(place, x, None if cache is None else cache.key.shape[-2], window)
  if cache is not None:
    new, cache = write(cache, KeyValue(key, value), place.start, layer)
    key, value = new.key, new.value
  shared = None
  if prefix is not None:
    shared = prefix.key, prefix.value, prefix_masks(place, x, prefix.key.shape[-2], window)
  out = layers.attend(query, key, value, mask_of, query_chunk=config.query_chunk, prefix=shared,
                      scale=config.attn_scale, cap=config.attn_cap)
  if config.attn_gate:
    out = out * jax.nn.sigmoid(layers.project(x, params.gate))
  return layers.project_heads(out, params.out), cache


def masks(place: Place, x: Array, held: int | None, window: int = 0):
  """mask_of(columns) of `layers.attend`: causal in the segment, or in the `held` cache columns."""
  def mask_of(columns):
    if held is None:
      last = columns[None]
      seen = jnp.arange(x.shape[1])[None, None] <= last[..., None]
      seen &= jnp.take(place.segment_ids, columns, axis=1)[:, :, None] == place.segment_ids[:, None]
    else:
      last = jnp.broadcast_to(place.start, x.shape[:1])[:, None] + columns[None]
      seen = jnp.arange(held)[None, None] <= last[..., None]
    if window:
      keys = jnp.arange(seen.shape[-1])[None, None]
      seen &= keys > last[..., None] - window
    return seen

  return mask_of


def prefix_masks(place: Place, x: Array, size: int, window: int = 0):
  """mask_of(columns) for the shared prompt of each row: what is filled, and inside the window."""
  length = jnp.repeat(place.prefix_length, x.shape[0] // place.prefix_length.shape[0])

  def mask_of(columns):
    keys = jnp.arange(size)[None, None]
    seen = keys < length[:, None, None]
    if window:
      own = jnp.broadcast_to(place.start, x.shape[:1])[:, None] + columns[None]
      seen &= keys > (length[:, None] + own)[..., None] - window
    return seen

  return mask_of


def write(cache, new, start: Array, layer):
  """Writes new keys at start.. of each row: (this layer's full keys and values, the cache).

  Without `layer` the cache is that of one layer, and all rows start at the same column. Arrays
  [B, KV, T, K] into [(R,) B, KV, S, K].
  """
  if layer is None:
    held = jax.tree.map(
      lambda old, x: axes.constrain(
        jax.lax.dynamic_update_slice(old, x, (0, 0, start, 0)), *KV_AXES[1:]), cache, new)
    return held, held

  def put(old, x):
    rows = jnp.arange(x.shape[0])[:, None]
    columns = start[:, None] + jnp.arange(x.shape[2])[None]
    return axes.constrain(
      old.at[layer, rows, :, columns].set(jnp.swapaxes(x, 1, 2), mode='drop'), *KV_AXES)

  held = jax.tree.map(put, cache, new)
  return jax.tree.map(lambda x: x[layer], held), held
