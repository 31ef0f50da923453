"""Attention layers that draw tokens at a fixed budget of keys (AsyncTLS, arXiv 2604.07815).

Prompts and appended chunks see all keys, as published; only a step of one token is sparse. The
channels of the labels are those that weigh most in the row itself, counted up to the last append:
so a row depends on nothing else in its batch, chunks change nothing, and weights may change between
rollouts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kernels import tls_attention as tls
from zppo_jax.mesh import axes
from zppo_jax.models import cache as cache_lib
from zppo_jax.models.cache import KeyValue, Latent, Sparse
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.mixers.place import Place

Array = jax.Array


def decode(config: ModelConfig, query: Array, new: KeyValue | Latent,
           rows: KeyValue | Latent | tls.pool.Pool, place: Place, cache: Sparse,
           scale: float | None) -> tuple[Array, Sparse]:
  """What query [B, 1, H, K] of the token at place.start reads, and the cache after it.

  `rows` hold its key [B, KV, 1, K] already, unless they are a pool, which takes it. A row that
  waits (segment 0) keeps its state.
  """
  own, kernel = config.sparse, config.sparse.kernel
  pooled = isinstance(rows, tls.pool.Pool)
  # Heads of queries go with those of their keys.
  given = (query[:, 0], jax.tree.map(lambda x: x[:, :, 0], new), cache.weight, cache.channels,
           None if pooled else rows)
  given, given_tree = jax.tree.flatten(given)
  kept, kept_tree = jax.tree.flatten((rows if pooled else None, cache.state, cache.traffic))
  pages = cache_lib.pool_axes(len(rows.host)) if pooled else []
  kept_axes = [*pages, *map(cache_lib.row_axes, kept[len(pages):])]
  settings = dict(config=kernel, scale=scale, implementation=own.implementation)

  def step(start, live, *leaves):
    q, added, weight, channels, keys = jax.tree.unflatten(given_tree, leaves[:len(given)])
    pool, state, traffic = jax.tree.unflatten(kept_tree, leaves[len(given):])
    more = jax.vmap(tls.weigh)(q[:, None], added.key[:, None], live[:, None])
    fixed = dict(settings, channels=channels)
    if pooled:
      at = jnp.where(live, start, pool.slot_of.shape[-1] * kernel.block)  # waits beyond the room
      out, pool, state, seen = tls.pool.decode(
        pool, state, q, added.key, _values(config, added), length=at, misses=own.misses, **fixed)
      traffic = jax.tree.map(lambda old, x: old + jnp.where(live[:, None], x, 0), traffic, seen)
    else:
      at = jnp.where(live, start, keys.key.shape[2])
      before, state = state, tls.append(state, added.key, at, channels, kernel)
      out, state = tls.decode(q, keys.key, _values(config, keys), state, length=start + 1, **fixed)
      state = dataclasses.replace(
        state, chosen=jnp.where(live[:, None, None], state.chosen, before.chosen))
    return out, weight + more, *jax.tree.leaves((pool, state, traffic))

  outs = [('batch', 'kv_heads', None), cache_lib.row_axes(cache.weight), *kept_axes]
  ins = [('batch',), ('batch',), *map(cache_lib.row_axes, given), *kept_axes]
  out, weight, *kept = axes.on_shards(step, ins, outs)(
    jnp.broadcast_to(place.start, query.shape[:1]), place.segment_ids[:, 0] > 0, *given, *kept)
  pool, state, traffic = jax.tree.unflatten(kept_tree, kept)
  return out[:, None], Sparse(pool if pooled else rows, state, weight, cache.channels, traffic)


def _values(config: ModelConfig, rows: KeyValue | Latent) -> Array | int:
  """Values beside the keys, or how many channels of latent keys are the values."""
  return config.mla.rank if isinstance(rows, Latent) else rows.value


def keep(config: ModelConfig, query: Array, new: KeyValue | Latent, place: Place) -> Sparse:
  """The cache of one layer after whole rows of T tokens, with the room that they need."""
  rows, heads, size, width = new.key.shape
  room = cache_lib.sparse_room(config, size)
  held = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, room - size), (0, 0))), new)
  state, weight, channels = cache_lib.sparse_books(config, rows, heads, room, width,
                                                   new.key.dtype)
  return renew(config, query, new, held, place, Sparse(held, state, weight, channels), held, None)


def renew(config: ModelConfig, query: Array, new: KeyValue | Latent, held: KeyValue | Latent,
          place: Place, cache: Sparse, rows, layer) -> Sparse:
  """The cache after tokens that saw all keys: `rows` as stored, `held` this layer's own.

  Bounds and labels are made anew, at the cost of reading the keys once more. query [B, T, H, K],
  new keys [B, KV, T, K].
  """
  own, real = config.sparse, place.segment_ids > 0
  take = (lambda x: x) if layer is None else (lambda x: x[layer])
  start = jnp.broadcast_to(place.start, query.shape[:1])
  added = jnp.sum(real, axis=1, dtype=jnp.int32)
  first, fed = (x[:, None, None] for x in ((start == 0) & (added > 0), added > 0))
  weight = jnp.where(first, 0, take(cache.weight)) + jax.vmap(tls.weigh)(
    query, jnp.swapaxes(new.key, 1, 2), real)
  channels = jnp.where(fed, tls.channels_of(weight, own.labels), take(cache.channels))
  state = tls.summarise(held.key, start + added, channels, own.kernel)
  chosen = take(cache.state.chosen)
  if own.kernel.stale:  # the first step looks where the last query of the prompt did
    last = jnp.maximum(added - 1, 0)[:, None, None, None]
    last = jnp.take_along_axis(query, last, axis=1)[:, 0]
    found = tls.choose(last, state, length=start + added, config=own.kernel)
    chosen = jnp.where(fed, found.chosen, chosen)
  state = dataclasses.replace(state, chosen=chosen)
  found = state, weight, channels
  if layer is not None:
    found = jax.tree.map(lambda old, x: old.at[layer].set(x),
                         (cache.state, cache.weight, cache.channels), found)
  return Sparse(rows, *found)
