"""Softmax attention of new tokens over what a cache and a shared prompt hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels import tls_attention as tls
from kernels.attention import attend, causal_masks
from kernels.common import dispatch
from zppo_jax.mesh import axes
from zppo_jax.models.cache import KV_AXES, KeyValue, Latent, Sparse
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.mixers import sparse
from zppo_jax.models.mixers.place import Place

Array = jax.Array


def read(config: ModelConfig, query: Array, new: KeyValue | Latent, place: Place, cache, layer,
         prefix, *, window: int = 0, scale: float | None = None, cap: float | None = None):
  """(what query [B, T, H, K] reads, [B, T, H, V]; the cache with the new keys [B, KV, T, K]).

  Zeros are written for what is not finite: a masked key of weight 0 would still make NaN of the
  next row in that place, and the row itself shows it by its residual.
  """
  if cache is not None:
    new = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), new)
  if isinstance(cache, Sparse):
    if isinstance(cache.rows, tls.pool.Pool):
      if query.shape[1] > 1:
        raise ValueError(f'sparse.pool: rows whose keys lie in host memory take one token at a '
                         f'time, got {query.shape[1]}')
      return sparse.decode(config, query, new, cache.rows, place, cache, scale)
    held, rows = _write(cache.rows, new, place.start, layer)
    if layer is None and query.shape[1] == 1:
      return sparse.decode(config, query, new, held, place, cache, scale)
    cache = sparse.renew(config, query, new, held, place, cache, rows, layer)
  elif cache is not None:
    held, cache = _write(cache, new, place.start, layer)
  else:
    held = new
  mask_of = _masks(place, query, None if cache is None else held.key.shape[-2], window)
  shared = None
  if prefix is not None:
    shared = prefix.key, values(config, prefix), _prefix_masks(
      place, query, prefix.key.shape[-2], window)
  out = attend(query, held.key, values(config, held), mask_of, query_chunk=config.query_chunk,
               prefix=shared, scale=scale, cap=cap)
  return out, cache


def keep(config: ModelConfig, query: Array, new: KeyValue | Latent, place: Place,
         sliding: bool = False) -> KeyValue | Latent | Sparse:
  """The cache of one layer that holds whole rows, keys [B, KV, T, K]; as long as they are."""
  new = jax.tree.map(lambda x: axes.constrain(x, *KV_AXES[1:]), new)
  return new if sliding or config.sparse is None else sparse.keep(config, query, new, place)


def values(config: ModelConfig, rows: KeyValue | Latent) -> Array:
  """Values [.., V] of cached keys; those of latent attention are a part of them."""
  return rows.key[..., :config.mla.rank] if isinstance(rows, Latent) else rows.value


def _masks(place: Place, query: Array, held: int | None, window: int = 0):
  """mask_of(columns) of `attend`: causal in the segment, or in the `held` cache columns."""
  if held is None:
    return causal_masks(place.segment_ids, window)

  def mask_of(columns):
    last = jnp.broadcast_to(place.start, query.shape[:1])[:, None] + columns[None]
    seen = jnp.arange(held)[None, None] <= last[..., None]
    if window:
      keys = jnp.arange(seen.shape[-1])[None, None]
      seen &= keys > last[..., None] - window
    return seen

  return mask_of


def _prefix_masks(place: Place, query: Array, size: int, window: int = 0):
  """mask_of(columns) of `attend` for the prompts that rows share: what is filled, in the window."""
  length = jnp.repeat(place.prefix_length, query.shape[0] // place.prefix_length.shape[0])

  def mask_of(columns):
    keys = jnp.arange(size)[None, None]
    seen = keys < length[:, None, None]
    if window:
      own = jnp.broadcast_to(place.start, query.shape[:1])[:, None] + columns[None]
      seen &= keys > (length[:, None] + own)[..., None] - window
    return seen

  return mask_of


def _write(cache, new, start: Array, layer):
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
    if layer is None and x.shape[2] == 1 and dispatch.platform() == 'tpu':
      return put_tokens(old, x, start)
    rows = jnp.arange(x.shape[0])[:, None]
    at = rows, slice(None), start[:, None] + jnp.arange(x.shape[2])[None]
    at = at if layer is None else (layer, *at)
    return axes.constrain(old.at[at].set(jnp.swapaxes(x, 1, 2), mode='drop'),
                          *KV_AXES[-old.ndim:])

  held = jax.tree.map(put, cache, new)
  return (held if layer is None else jax.tree.map(lambda x: x[layer], held)), held


def put_tokens(old: Array, x: Array, start: Array) -> Array:
  """[B, KV, S, K] with x [B, KV, 1, K] in column start[b] of its row, if there is one.

  Row by row and in place: a scatter makes TPUs copy the cache.
  """
  def shard(old, x, start):
    def put(b, cache):
      at = b, 0, start[b], 0
      here, new = (lax.dynamic_slice(y, z, (1, *x.shape[1:])) for y, z in (
        (cache, at), (x, (b, 0, 0, 0))))
      return lax.dynamic_update_slice(cache, jnp.where(start[b] < cache.shape[2], new, here), at)

    return (lax.fori_loop(0, len(start), put, old),)

  rows = KV_AXES[1:]
  return axes.on_shards(shard, [rows, rows, ('batch',)], [rows])(old, x, start)[0]
