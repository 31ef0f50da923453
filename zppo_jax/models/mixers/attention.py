"""Softmax attention, over all tokens or over a sliding window."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention import attend, causal_masks
from kernels.attention import attention as fused_attention
from zppo_jax.mesh import axes
from zppo_jax.models import layers
from zppo_jax.models.cache import KeyValue, Sparse
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.mixers import cached
from zppo_jax.models.mixers.place import Place

Array = jax.Array


def attention(sliding: bool, config: ModelConfig, params, x: Array, place: Place,
              cache: KeyValue | Sparse | None, layer, prefix: KeyValue | None = None
              ) -> tuple[Array, KeyValue | Sparse | None]:
  """Causal grouped-query attention with rotary positions; QK-norm and gate where the config says
  so. x [B, T, D]; `sliding` sees the last config.window keys, its own included."""
  query, key, value = (layers.project(x, w) for w in (params.query, params.key, params.value))
  if config.qk_norm:
    query = layers.norm(config, query, params.query_norm)
    key = layers.norm(config, key, params.key_norm)
  angles = place.rotary[config.rope_dim or config.head_dim]
  query, key = layers.rope(query, *angles), layers.rope(key, *angles)
  window = config.window if sliding else 0
  new = KeyValue(jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))  # [B, KV, T, K]
  if cache is None and prefix is None:
    out = attend_rows(config, query, key, value, place, window=window, scale=config.attn_scale,
                      cap=config.attn_cap)
    cache = cached.keep(config, query, new, place, sliding) if place.keep else None
  else:
    out, cache = cached.read(config, query, new, place, cache, layer, prefix, window=window,
                             scale=config.attn_scale, cap=config.attn_cap)
  if config.attn_gate:
    out = out * jax.nn.sigmoid(layers.project(x, params.gate))
  return layers.project_heads(out, params.out), cache


def attend_rows(config: ModelConfig, query: Array, key: Array, value: Array, place: Place, *,
                window: int = 0, scale: float | None = None, cap: float | None = None) -> Array:
  """Causal attention of whole rows on the chips that hold them; [B, T, H or KV, K] each.

  A row that is cut along the context axis sends its keys and values to all of its chips.
  """
  parts = axes.shards('length', query.shape[1])
  scale = query.shape[-1] ** -0.5 if scale is None else scale

  def rows(query, key, value, ids):
    if parts == 1:
      return fused_attention(query, key, value, segment_ids=ids, scale=scale, window=window,
                             cap=cap, query_chunk=config.query_chunk,
                             implementation=config.attn_kernel),
    key, value, all_ids = (lax.all_gather(a, 'context', axis=1, tiled=True)
                           for a in (key, value, ids))
    first = lax.axis_index('context') * query.shape[1]
    return attend(query, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2),
                  causal_masks(ids, window, all_ids, first), scale=scale, cap=cap,
                  query_chunk=max(1, config.query_chunk // parts)),  # of the chips together

  heads = 'batch', 'length', 'kv_heads', None
  key, value = (_divisible(a, query.shape[2]) for a in (key, value))
  return axes.on_shards(rows, [heads] * 3 + [('batch', 'length')], [heads])(
    query, key, value, place.segment_ids)[0]


def _divisible(x: Array, heads: int) -> Array:
  """Key heads repeated, if they are fewer than the chips that the query heads are cut over."""
  parts, held = axes.shards('heads', heads), x.shape[2]
  wanted = math.lcm(held, parts)
  return x if heads % wanted else jnp.repeat(x, wanted // held, axis=2)
