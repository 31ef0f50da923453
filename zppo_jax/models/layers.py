"""Building blocks without state. Dims: B rows, T tokens, S keys, H heads, KV key heads, K head
size."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def project(x: Array, weight: Array) -> Array:
  """x [B, T, D] by weight [D, ...] -> [B, T, ...], as one flat product.

  XLA's CPU backward of a batched product is twice as slow.
  """
  wide = x.reshape(-1, x.shape[-1]) @ weight.astype(x.dtype).reshape(weight.shape[0], -1)
  return wide.reshape(*x.shape[:2], *weight.shape[1:])


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
  """x / rms(x) * weight over the last axis, in float32, cast back before the product."""
  x32 = x.astype(jnp.float32)
  scaled = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return scaled.astype(x.dtype) * weight.astype(x.dtype)


def rope(x: Array, positions: Array, theta: float) -> Array:
  """Rotary positions in the two-halves layout; x [B, T, H, K], positions i32[B, T]."""
  half = x.shape[-1] // 2
  freqs = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions.astype(jnp.float32)[..., None, None] * freqs
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
  """(silu(x gate) * (x up)) down."""
  dtype = x.dtype
  flat = x.reshape(-1, x.shape[-1])  # XLA's CPU backward of a batched product is twice as slow
  wide = jax.nn.silu(flat @ gate.astype(dtype)) * (flat @ up.astype(dtype))
  return (wide @ down.astype(dtype)).reshape(x.shape)


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


def _attend_block(query: Array, key: Array, value: Array, mask: Array, prefix) -> Array:
  """query [B, KV, M, T, K], mask bool[B, T, S]; prefix is None or (key, value, mask[P, L])."""
  query = query / math.sqrt(query.shape[-1])
  scores = jnp.where(mask[:, None, None], _scores(query, key), -1e30)
  if prefix is None:
    return _mix(jax.nn.softmax(scores, axis=-1), value)
  shared_key, shared_value, shared_mask = prefix
  rows, groups, size = query.shape[0], *shared_mask.shape
  shared = _scores(_by_group(query, groups), shared_key)
  shared = _by_row(jnp.where(shared_mask[:, None, None, None], shared, -1e30), rows)
  weights = jax.nn.softmax(jnp.concatenate([shared, scores], axis=-1), axis=-1)
  out = _mix(_by_group(weights[..., :size], groups), shared_value)
  return _by_row(out, rows) + _mix(weights[..., size:], value)


def attend(query: Array, key: Array, value: Array, mask_of, *, query_chunk: int,
           prefix=None) -> Array:
  """Grouped-query softmax attention; query [B, T, H, K], key, value [B, KV, S, K] -> as query.

  `mask_of(columns)` gives bool[B, len(columns), S] for a range of query columns, so that a long
  sequence never holds more than query_chunk x S scores; the scores of a chunk are recomputed in
  the backward pass. `prefix` = (key, value [P, KV, L, K], mask bool[P, L]) comes before the keys:
  it is common to B / P neighbouring rows, and all queries see it where the mask is true.
  """
  batch, length, heads, size = query.shape
  groups = key.shape[1]
  grouped = query.reshape(batch, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)

  def join(out):
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, -1, heads, size)

  if length <= query_chunk:
    return join(_attend_block(grouped, key, value, mask_of(jnp.arange(length)), prefix))
  num_chunks = -(-length // query_chunk)
  padded = jnp.pad(grouped, ((0, 0),) * 3 + ((0, num_chunks * query_chunk - length), (0, 0)))
  chunks = jnp.moveaxis(padded.reshape(*padded.shape[:3], num_chunks, query_chunk, size), 3, 0)

  @jax.checkpoint
  def one(args):
    chunk, index = args
    columns = jnp.minimum(index * query_chunk + jnp.arange(query_chunk), length - 1)
    return _attend_block(chunk, key, value, mask_of(columns), prefix)

  out = jax.lax.map(one, (chunks, jnp.arange(num_chunks)))
  return join(jnp.moveaxis(out, 0, 3).reshape(*padded.shape))[:, :length]
