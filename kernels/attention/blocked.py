"""Softmax attention as XLA operations, block by block of queries. Dims: B rows, T tokens, S keys,
H heads, KV key heads, K key size, V value size."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array
QUERY_CHUNK = 1024  # queries whose scores are held at once


def attention(query: Array, key: Array, value: Array, *, segment_ids: Array, scale: float,
              window: int, cap: float | None, query_chunk: int = QUERY_CHUNK) -> Array:
  """Arguments as `api.attention` prepares them."""
  return attend(query, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2),
                causal_masks(segment_ids, window), query_chunk=query_chunk, scale=scale, cap=cap)


def causal_masks(segment_ids: Array, window: int = 0, key_ids: Array | None = None, first=0):
  """mask_of(columns) of `attend`: causal inside equal segment ids, window keys back (0 = all).

  The columns of `segment_ids` [B, T] stand from column `first` on among those of `key_ids` [B, S],
  by default the same.
  """
  key_ids = segment_ids if key_ids is None else key_ids

  def mask_of(columns):
    last = (columns + first)[None, :, None]
    keys = jnp.arange(key_ids.shape[1])[None, None]
    seen = keys <= last
    if window:
      seen &= keys > last - window
    return seen & (jnp.take(segment_ids, columns, axis=1)[:, :, None] == key_ids[:, None])

  return mask_of


def _scores(query: Array, key: Array) -> Array:
  """query [B, KV, M, T, K], key [B, KV, S, K] -> f32[B, KV, M, T, S]."""
  batch, groups, per_group, length, size = query.shape
  flat = query.reshape(batch, groups, per_group * length, size)
  scores = jnp.einsum('bgik,bgsk->bgis', flat, key, preferred_element_type=jnp.float32)
  return scores.reshape(batch, groups, per_group, length, -1)


def _mix(weights: Array, value: Array) -> Array:
  """weights [B, KV, M, T, S], value [B, KV, S, K] -> [B, KV, M, T, K]."""
  batch, groups, per_group, length, keys = weights.shape
  flat = weights.astype(value.dtype).reshape(batch, groups, per_group * length, keys)
  out = jnp.einsum('bgis,bgsk->bgik', flat, value)
  return out.reshape(batch, groups, per_group, length, -1)


def _by_group(x: Array, groups: int) -> Array:
  """[P * G, KV, M, T, K] -> [P, KV, G * M, T, K]: one product serves all rows of a group."""
  rows, heads, per_group, length, size = x.shape
  x = x.reshape(groups, rows // groups, heads, per_group, length, size)
  return jnp.moveaxis(x, 1, 2).reshape(groups, heads, -1, length, size)


def _by_row(x: Array, rows: int) -> Array:
  """Inverse of _by_group."""
  groups, heads, wide, length, size = x.shape
  x = x.reshape(groups, heads, rows // groups, -1, length, size)
  return jnp.moveaxis(x, 2, 1).reshape(rows, heads, -1, length, size)


def _capped(scores: Array, cap: float | None) -> Array:
  return scores if cap is None else cap * jnp.tanh(scores / cap)


def _attend_block(query: Array, key: Array, value: Array, mask: Array, prefix, cap) -> Array:
  """query [B, KV, M, T, K], scaled, mask bool[B, T, S]; prefix is None or (key, value, mask[B, T or
  1, L])."""
  scores = jnp.where(mask[:, None, None], _capped(_scores(query, key), cap), -1e30)
  if prefix is None:
    return _mix(jax.nn.softmax(scores, axis=-1), value)
  shared_key, shared_value, shared_mask = prefix
  rows, groups, size = query.shape[0], shared_key.shape[0], shared_key.shape[2]
  shared = _by_row(_capped(_scores(_by_group(query, groups), shared_key), cap), rows)
  shared = jnp.where(shared_mask[:, None, None], shared, -1e30)
  weights = jax.nn.softmax(jnp.concatenate([shared, scores], axis=-1), axis=-1)
  out = _mix(_by_group(weights[..., :size], groups), shared_value)
  return _by_row(out, rows) + _mix(weights[..., size:], value)


def attend(query: Array, key: Array, value: Array, mask_of, *, query_chunk: int,
           prefix=None, scale: float | None = None, cap: float | None = None) -> Array:
  """Grouped-query softmax attention; query [B, T, H, K], key [B, KV, S, K], value [B, KV, S, V] ->
  [B, T, H, V].

  `mask_of(columns)` gives bool[B, len(columns), S] for a range of query columns, so that a long
  sequence never holds more than query_chunk x S scores; the scores of a chunk are recomputed in
  the backward pass. `prefix` = (key [P, KV, L, K], value [P, KV, L, V], mask_of as above, [B,
  len(columns) or 1, L]) comes before the keys and is common to B / P neighbouring rows. Scores are
  multiplied by `scale` (K ** -0.5), then softly capped: cap tanh(. / cap).
  """
  batch, length, heads, size = query.shape
  groups = key.shape[1]
  scale = size**-0.5 if scale is None else scale
  query = (query.astype(jnp.float32) * scale).astype(query.dtype)
  grouped = query.reshape(batch, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)

  def join(out):
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, -1, heads, out.shape[-1])

  def block(chunk, columns):
    shared = None if prefix is None else (*prefix[:2], prefix[2](columns))
    return _attend_block(chunk, key, value, mask_of(columns), shared, cap)

  if length <= query_chunk:
    return join(block(grouped, jnp.arange(length)))
  num_chunks = -(-length // query_chunk)
  padded = jnp.pad(grouped, ((0, 0),) * 3 + ((0, num_chunks * query_chunk - length), (0, 0)))
  chunks = jnp.moveaxis(padded.reshape(*padded.shape[:3], num_chunks, query_chunk, size), 3, 0)

  @jax.checkpoint
  def one(args):
    chunk, index = args
    columns = jnp.minimum(index * query_chunk + jnp.arange(query_chunk), length - 1)
    return block(chunk, columns)

  out = jnp.moveaxis(jax.lax.map(one, (chunks, jnp.arange(num_chunks))), 0, 3)
  return join(out.reshape(*padded.shape[:-1], out.shape[-1]))[:, :length]
