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
  window = config.window if sliding else 0
  if cache is None and prefix is None:
    out = attend_rows(config, query, key, value, place, window=window, scale=config.attn_scale,
                      cap=config.attn_cap)
  else:
    new = KeyValue(jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))  # [B, KV, T, K]
    mask_of = masks(place, x, None if cache is None else cache.key.shape[-2], window)
    if cache is not None:
      new, cache = write(cache, new, place.start, layer)
    shared = None
    if prefix is not None:
      shared = prefix.key, prefix.value, prefix_masks(place, x, prefix.key.shape[-2], window)
    out = attend(query, new.key, new.value, mask_of, query_chunk=config.query_chunk, prefix=shared,
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
                  causal_masks(ids, window, all_ids, first), query_chunk=config.query_chunk,
                  scale=scale, cap=cap),

  heads = 'batch', 'length', 'kv_heads', None
  key, value = (_divisible(a, query.shape[2]) for a in (key, value))
  return axes.on_shards(rows, [heads] * 3 + [('batch', 'length')], [heads])(
    query, key, value, place.segment_ids)[0]


def _divisible(x: Array, heads: int) -> Array:
  """Key heads repeated, if they are fewer than the chips that the query heads are cut over."""
  parts, held = axes.shards('heads', heads), x.shape[2]
  wanted = math.lcm(held, parts)
  return x if heads % wanted else jnp.repeat(x, wanted // held, axis=2)


def masks(place: Place, x: Array, held: int | None, window: int = 0):
  """mask_of(columns) of `attend`: causal in the segment, or in the `held` cache columns."""
  if held is None:
    return causal_masks(place.segment_ids, window)

  def mask_of(columns):
    last = jnp.broadcast_to(place.start, x.shape[:1])[:, None] + columns[None]
    seen = jnp.arange(held)[None, None] <= last[..., None]
    if window:
      keys = jnp.arange(seen.shape[-1])[None, None]
      seen &= keys > last[..., None] - window
    return seen

  return mask_of


def prefix_masks(place: Place, x: Array, size: int, window: int = 0):
  """mask_of(columns) of `attend` for the prompts that rows share: what is filled, in the window."""
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

  Without `layer` the cache is that of one layer; rows that all start at the same column are written
  as one slice. Arrays [B, KV, T, K] into [(R,) B, KV, S, K].
  """
  if layer is None and not start.ndim:
    held = jax.tree.map(
      lambda old, x: axes.constrain(
        lax.dynamic_update_slice(old, x, (0, 0, start, 0)), *KV_AXES[1:]), cache, new)
    return held, held

  def put(old, x):
    rows = jnp.arange(x.shape[0])[:, None]
    at = rows, slice(None), start[:, None] + jnp.arange(x.shape[2])[None]
    at = at if layer is None else (layer, *at)
    return axes.constrain(old.at[at].set(jnp.swapaxes(x, 1, 2), mode='drop'),
                          *KV_AXES[-old.ndim:])

  held = jax.tree.map(put, cache, new)
  return (held if layer is None else jax.tree.map(lambda x: x[layer], held)), held
