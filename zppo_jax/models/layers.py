"""Building blocks without state. Dims: B rows, T tokens, S keys, H heads, KV key heads, K head
size."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array


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
  return (jax.nn.silu(x @ gate.astype(dtype)) * (x @ up.astype(dtype))) @ down.astype(dtype)


def _attend_block(query: Array, key: Array, value: Array, mask: Array) -> Array:
  # 'bgths' is the order in which the product comes out: any other costs a copy of all scores.
  scores = jnp.einsum('btghk,bsgk->bgths', query, key, preferred_element_type=jnp.float32)
  scores = jnp.where(mask[:, None, :, None], scores / math.sqrt(query.shape[-1]), -1e30)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  return jnp.einsum('bgths,bsgk->btghk', weights, value)


def attend(query: Array, key: Array, value: Array, mask_of, *, query_chunk: int) -> Array:
  """Grouped-query softmax attention; query [B, T, H, K], key and value [B, S, KV, K] -> [B, T, H,
  K].

  `mask_of(columns)` gives bool[B, len(columns), S] for a range of query columns, so that a long
  sequence never holds more than query_chunk x S scores; the scores of a chunk are recomputed in
  the backward pass.
  """
  batch, length, heads, size = query.shape
  groups = key.shape[2]
  grouped = query.reshape(batch, length, groups, heads // groups, size)
  if length <= query_chunk:
    return _attend_block(grouped, key, value, mask_of(jnp.arange(length))).reshape(query.shape)
  num_chunks = -(-length // query_chunk)
  padded = jnp.pad(grouped, ((0, 0), (0, num_chunks * query_chunk - length)) + ((0, 0),) * 3)
  chunks = jnp.moveaxis(
    padded.reshape(batch, num_chunks, query_chunk, groups, heads // groups, size), 1, 0)

  @jax.checkpoint
  def one(args):
    chunk, index = args
    columns = jnp.minimum(index * query_chunk + jnp.arange(query_chunk), length - 1)
    return _attend_block(chunk, key, value, mask_of(columns))

  out = jnp.moveaxis(jax.lax.map(one, (chunks, jnp.arange(num_chunks))), 0, 1)
  return out.reshape(batch, -1, heads, size)[:, :length]
