"""Segments, positions and windows. Dims: B rows, T tokens; segment 0 is padding."""

import jax
import jax.numpy as jnp


def positions_in_segments(segment_ids: jax.Array) -> jax.Array:
  """Position of each token inside its segment, i32[B, T]; segments are contiguous runs."""
  index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
  starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
  return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def segments_from_lengths(length: jax.Array, size: int) -> jax.Array:
  """1 on the first `length` columns, else 0: i32[B, size]."""
  return (jnp.arange(size)[None] < length[:, None]).astype(jnp.int32)


def window_start(mask: jax.Array, size: int) -> jax.Array:
  """First column of a window of `size` columns that begins at the first true token, i32[B]."""
  return jnp.minimum(jnp.argmax(mask, axis=1), mask.shape[1] - size).astype(jnp.int32)


def take_window(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
  """Columns start..start+size-1 of each row: [B, T, ...] -> [B, size, ...]."""
  index = start[:, None] + jnp.arange(size)[None]
  return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def put_window(x: jax.Array, start: jax.Array, total: int) -> jax.Array:
  """Inverse of take_window: [B, size] -> [B, total], zero outside the window."""
  index = jnp.arange(total)[None] - start[:, None]
  inside = (index >= 0) & (index < x.shape[1])
  return jnp.where(inside, jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1), axis=1), 0)
