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
from zppo_jax.models.cache import KeyValue, Latent, Sparse
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.mixers.place import Place

Array = jax.Array


def decode(config: ModelConfig, query: Array, new: KeyValue | Latent, rows: KeyValue | Latent,
           place: Place, cache: Sparse, scale: float | None) -> tuple[Array, Sparse]:
  """What query [B, 1, H, K] of the token at place.start reads, and the cache after it.

  `rows` hold its key [B, KV, 1, K] already. A row that waits (segment 0) keeps its state.
  """
  own, kernel = config.sparse, config.sparse.kernel
  latent = isinstance(rows, Latent)
  names = lambda x: ('batch', 'kv_heads', *(None,) * (x.ndim - 2))
  state, tree = jax.tree.flatten(cache.state)
  # Heads of queries go with those of their keys.
  arrays = [query[:, 0], new.key[:, :, 0], cache.weight, cache.channels, rows.key,
            *([] if latent else [rows.value]), *state]
  ins = [('batch',), ('batch',), *map(names, arrays)]

  def step(start, live, q, added, weight, channels, key, *rest):
    value, held = (config.mla.rank, rest) if latent else (rest[0], rest[1:])
    before = jax.tree.unflatten(tree, held)
    at = jnp.where(live, start, key.shape[2])  # beyond the room: nothing is added
    after = tls.append(before, added, at, channels, kernel)
    out, after = tls.decode(q, key, value, after, channels=channels, length=start + 1,
                            config=kernel, scale=scale, implementation=own.implementation)
    chosen = jnp.where(live[:, None, None], after.chosen, before.chosen)
    more = jax.vmap(tls.weigh)(q[:, None], added[:, None], live[:, None])
    return out, weight + more, *jax.tree.leaves(dataclasses.replace(after, chosen=chosen))

  outs = [('batch', 'kv_heads', None), names(cache.weight), *map(names, state)]
  out, weight, *state = axes.on_shards(step, ins, outs)(
    jnp.broadcast_to(place.start, query.shape[:1]), place.segment_ids[:, 0] > 0, *arrays)
  return out[:, None], Sparse(rows, jax.tree.unflatten(tree, state), weight, cache.channels)


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
