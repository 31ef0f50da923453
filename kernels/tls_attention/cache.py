"""Summaries and labels of keys: made at once after a prefill, or token by token."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from kernels.common import dispatch
from kernels.tls_attention import tpu_append
from kernels.tls_attention.config import (
  NONE,
  Array,
  Config,
  Labels,
  State,
  Summary,
  per_row,
  problems_of_channels,
)

LEVELS = 15  # of a 4-bit code


def weigh(query: Array, key: Array, real: Array | None = None) -> Array:
  """How much each channel of a key head has to say: the sum of |q_d k_d|, f32[HK, D].

  query [S, HQ, D] and key [S, HK, D] of the tokens that bool[S] `real` counts; the mean over the
  query heads of the key head. arXiv 2408.07092.
  """
  grouped = jnp.abs(query.astype(jnp.float32)).reshape(len(query), key.shape[1], -1, key.shape[2])
  product = grouped.mean(2) * jnp.abs(key.astype(jnp.float32))
  if real is not None:
    product = jnp.where(real[:, None, None], product, 0)
  return jnp.sum(product, axis=0)


def channels_of(weight: Array, count: int) -> Array:
  """Channels i32[..., HK, count] with the largest weights of f32[..., HK, D], in rising order."""
  return jnp.sort(lax.top_k(weight, count)[1], axis=-1).astype(jnp.int32)


def calibrate(query: Array, key: Array, count: int) -> Array:
  """`channels_of` what `weigh` finds in sampled queries [S, HQ, D] and keys [S, HK, D]."""
  samples, heads, width = query.shape
  if heads % key.shape[1] or key.shape[::2] != query.shape[::2]:
    raise ValueError(f'query {query.shape} and key {key.shape} must be [S, HQ, D] and [S, HK, D], '
                     'HQ a multiple of HK')
  if not 1 <= count <= width:
    raise ValueError(f'count must lie in 1..D = {width}, got {count}')
  return channels_of(weigh(query, key), count)


def quantise(rows: Array) -> tuple[Array, Array, Array]:
  """(codes u8[..., R / 2], scale f32[...], zero f32[...]) of f[..., R]; equal channels give 0."""
  rows = rows.astype(jnp.float32)
  zero = jnp.min(rows, axis=-1)
  scale = (jnp.max(rows, axis=-1) - zero) / LEVELS
  code = (rows - zero[..., None]) / jnp.where(scale > 0, scale, 1)[..., None]
  code = jnp.round(code).astype(jnp.uint8)
  low, high = jnp.split(code, 2, axis=-1)
  return low | (high << 4), scale, zero


def label_of(key: Array, channels: Array) -> tuple[Array, Array, Array]:
  """`quantise` of the labels of keys [B, HK, N, D]."""
  picked = jnp.take_along_axis(key, per_row(channels)[:, :, None], axis=3)
  return quantise(picked)


def empty(rows: int, heads: int, room: int, width: int, labels: int, config: Config, dtype
          ) -> State:
  """State of no keys, for caches [rows, heads, room, width] and labels of so many channels."""
  tokens, far = (rows, heads, room), jnp.finfo(dtype)
  bounds = jnp.full((rows, heads, room // config.block, width), far.min, dtype)
  chosen = jnp.full((rows, heads, config.top_blocks), NONE, jnp.int32)
  return State(Summary(jnp.concatenate([bounds, -bounds], axis=-1)),
               Labels(jnp.zeros((rows, heads, labels // 2, room), jnp.uint8), jnp.zeros(tokens),
                      jnp.zeros(tokens)), chosen)


def summarise(key: Array, length: Array, channels: Array, config: Config) -> State:
  """State behind the first length[b] keys of [B, HK, N, D]; nothing is chosen yet.

  Raises ValueError on channels or a room that do not fit.
  """
  rows, heads, room, width = key.shape
  found = problems_of_channels(channels, key)
  if room % config.block:
    found.append(f'N must be a multiple of block = {config.block}, got {room}')
  if found:
    raise ValueError('tls_attention: ' + '; '.join(found))
  blocks = room // config.block
  real = (jnp.arange(room)[None] < length[:, None])[:, None, :, None]
  cut = lambda x: x.reshape(rows, heads, blocks, config.block, width)
  far = jnp.finfo(key.dtype)
  high = jnp.max(cut(jnp.where(real, key, far.min)), axis=3)
  low = jnp.min(cut(jnp.where(real, key, far.max)), axis=3)
  codes, scale, zero = label_of(key, channels)
  chosen = jnp.full((rows, heads, config.top_blocks), NONE, jnp.int32)
  return State(Summary(jnp.concatenate([high, low], axis=-1)),
               Labels(jnp.swapaxes(codes, 2, 3), scale, zero), chosen)


def pack(key: Array, value: Array) -> Array:
  """[B, HK, N, 2, D] of keys and values [B, HK, N, D]: a token's two rows beside each other, so
  that one copy fetches both."""
  if key.shape != value.shape:
    raise ValueError(f'keys {key.shape} and values {value.shape} must have one shape to be packed')
  return jnp.stack([key, value], axis=3)


def append(state: State, key: Array, length: Array, channels: Array, config: Config,
           implementation: str | None = None) -> State:
  """Adds the label and the bounds of one key [B, HK, D], the token number length[b] of its row.

  The first token of a block replaces its bounds: they may be those of a row that was here before.
  """
  label = tuple(x[:, :, 0] for x in label_of(key[:, :, None], channels))
  table = {'pallas_tpu': tpu_append.write, 'scatter': scatter}
  return dispatch.run('tls_attention.append', table, implementation, tuple(table), state, key,
                      label, length, config)


def scatter(state: State, key: Array, label: tuple[Array, Array, Array], length: Array,
            config: Config) -> State:
  """`append` of a key and its label as XLA operations."""
  rows = jnp.arange(key.shape[0])
  block = length // config.block
  held = state.summary.bounds
  at = jnp.minimum(block, held.shape[2] - 1)[:, None, None, None]
  high, low = jnp.split(jnp.take_along_axis(held, at, axis=2)[:, :, 0], 2, axis=-1)
  own = key.astype(held.dtype)
  opens = (length % config.block == 0)[:, None, None]
  wider = jnp.concatenate([jnp.where(opens, own, jnp.maximum(high, own)),
                           jnp.where(opens, own, jnp.minimum(low, own))], axis=-1)
  summary = Summary(held.at[rows, :, block].set(wider, mode='drop'))
  codes, scale, zero = label
  labels = Labels(state.labels.codes.at[rows, :, :, length].set(codes, mode='drop'),
                  state.labels.scale.at[rows, :, length].set(scale, mode='drop'),
                  state.labels.zero.at[rows, :, length].set(zero, mode='drop'))
  return State(summary, labels, state.chosen)
