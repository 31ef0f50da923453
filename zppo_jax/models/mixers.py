"""Token mixers: apply(config, params, x, place, cache, layer) -> (y, cache). One row of MIXERS
each."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zppo_jax.core import types
from zppo_jax.mesh import axes
from zppo_jax.models import layers
from zppo_jax.models.cache import KV_AXES, KeyValue
from zppo_jax.models.config import ModelConfig

Array = jax.Array


@types.record
class Place:
  """Where the tokens of a call stand."""

  positions: Array  # i32[B, T], rotary positions
  segment_ids: Array  # i32[B, T], 0 = padding
  start: Array  # i32[B], column of the first token in the cache (0 without one)


def full_attention(config: ModelConfig, params, x: Array, place: Place, cache: KeyValue | None,
                   layer) -> tuple[Array, KeyValue | None]:
  """Causal grouped-query attention with QK-norm and rotary positions; x [B, T, D]."""
  dtype = x.dtype
  query = jnp.einsum('btd,dhk->bthk', x, params.query.astype(dtype))
  key = jnp.einsum('btd,dhk->bthk', x, params.key.astype(dtype))
  value = jnp.einsum('btd,dhk->bthk', x, params.value.astype(dtype))
  if config.qk_norm:
    query = layers.rms_norm(query, params.query_norm, config.norm_eps)
    key = layers.rms_norm(key, params.key_norm, config.norm_eps)
  query = layers.rope(query, place.positions, config.rope_theta)
  key = layers.rope(key, place.positions, config.rope_theta)
  if cache is None:
    def mask_of(columns):
      same = jnp.take(place.segment_ids, columns, axis=1)[:, :, None] == place.segment_ids[:, None]
      return same & (columns[:, None] >= jnp.arange(x.shape[1])[None])
  else:
    key, value, cache = _write(cache, key, value, place.start, layer)

    def mask_of(columns):
      last = place.start[:, None] + columns[None]
      return jnp.arange(key.shape[1])[None, None] <= last[:, :, None]

  out = layers.attend(query, key, value, mask_of, query_chunk=config.query_chunk)
  return jnp.einsum('bthk,hkd->btd', out, params.out.astype(dtype)), cache


def _write(cache: KeyValue, key: Array, value: Array, start: Array, layer):
  """Writes new keys at start.. of each row; returns this layer's full keys and values."""
  rows = jnp.arange(key.shape[0])[:, None]
  columns = start[:, None] + jnp.arange(key.shape[1])[None]
  new = KeyValue(cache.key.at[layer, rows, columns].set(key, mode='drop'),
                 cache.value.at[layer, rows, columns].set(value, mode='drop'))
  new = jax.tree.map(lambda a: axes.constrain(a, *KV_AXES), new)
  return new.key[layer], new.value[layer], new


MIXERS = {'full': full_attention}
