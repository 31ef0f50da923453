"""Softmax attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zppo_jax.mesh import axes
from zppo_jax.models import layers
from zppo_jax.models.cache import KV_AXES, KeyValue
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.mixers.place import Place

Array = jax.Array


def full_attention(config: ModelConfig, params, x: Array, place: Place, cache: KeyValue | None,
                   layer, prefix: KeyValue | None = None) -> tuple[Array, KeyValue | None]:
  """Causal grouped-query attention with QK-norm and rotary positions; x [B, T, D]."""
  query, key, value = (layers.project(x, w) for w in (params.query, params.key, params.value))
  if config.qk_norm:
    query = layers.rms_norm(query, params.query_norm, config.norm_eps)
    key = layers.rms_norm(key, params.key_norm, config.norm_eps)
  query = layers.rope(query, place.positions, config.rope_theta)
  key = layers.rope(key, place.positions, config.rope_theta)
  key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)  # [B, KV, T, K]
  if cache is None:
    def mask_of(columns):
      same = jnp.take(place.segment_ids, columns, axis=1)[:, :, None] == place.segment_ids[:, None]
      return same & (columns[:, None] >= jnp.arange(x.shape[1])[None])
  else:
    key, value, cache = _write(cache, key, value, place.start, layer)

    def mask_of(columns):
      last = jnp.broadcast_to(place.start, x.shape[:1])[:, None] + columns[None]
      return jnp.arange(key.shape[2])[None, None] <= last[:, :, None]

  shared = None
  if prefix is not None:
    filled = jnp.arange(prefix.key.shape[2])[None] < place.prefix_length[:, None]
    shared = prefix.key, prefix.value, filled
  out = layers.attend(query, key, value, mask_of, query_chunk=config.query_chunk, prefix=shared)
  weight = params.out.astype(x.dtype).reshape(-1, x.shape[-1])
  out = out.reshape(-1, weight.shape[0]) @ weight
  return out.reshape(x.shape), cache


def _write(cache: KeyValue, key: Array, value: Array, start: Array, layer):
  """Writes new keys at start.. of each row; returns this layer's full keys and values.

  Without `layer` the cache is that of one layer, and all rows start at the same column.
  """
  if layer is None:
    new = jax.tree.map(
      lambda held, x: axes.constrain(
        jax.lax.dynamic_update_slice(held, x, (0, 0, start, 0)), *KV_AXES[1:]),
      cache, KeyValue(key, value))
    return new.key, new.value, new
  rows = jnp.arange(key.shape[0])[:, None]
  columns = start[:, None] + jnp.arange(key.shape[2])[None]
  new = jax.tree.map(
    lambda held, x: axes.constrain(
      held.at[layer, rows, :, columns].set(jnp.swapaxes(x, 1, 2), mode='drop'), *KV_AXES),
    cache, KeyValue(key, value))
  return new.key[layer], new.value[layer], new
