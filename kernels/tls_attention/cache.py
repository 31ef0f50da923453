"""Summaries and labels of keys: made at once after a prefill, or token by token."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from kernels.tls_attention.config import Array, Config, Labels, State, Summary, problems_of_channels

LEVELS = 15  # of a 4-bit code


def calibrate(query: Array, key: Array, count: int) -> Array:
  """Channels i32[HK, count] of a head with the largest mean of |q_d k_d|, in rising order.

  query [S, HQ, D] and key [S, HK, D] of sampled tokens; the mean is over tokens and over the query
  heads of the key head. arXiv 2408.07092.
  """
  samples, heads, width = query.shape
  if heads % key.shape[1] or key.shape[::2] != query.shape[::2]:
    raise ValueError(f'query {query.shape} and key {key.shape} must be [S, HQ, D] and [S, HK, D], '
                     'HQ a multiple of HK')
  if not 1 <= count <= width:
    raise ValueError(f'count must lie in 1..D = {width}, got {count}')
  grouped = jnp.abs(query).reshape(samples, key.shape[1], -1, width).mean(2)
  weight = jnp.mean(grouped * jnp.abs(key), axis=0)
  return jnp.sort(lax.top_k(weight, count)[1], axis=-1).astype(jnp.int32)


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
  picked = jnp.take_along_axis(key, channels[None, :, None].astype(jnp.int32), axis=3)
  return quantise(picked)


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
  chosen = jnp.full((rows, heads, config.top_blocks), blocks, jnp.int32)
  return State(Summary(jnp.concatenate([high, low], axis=-1)),
               Labels(jnp.swapaxes(codes, 2, 3), scale, zero), chosen)


def append(state: State, key: Array, length: Array, channels: Array, config: Config) -> State:
  """Adds the label and the bounds of one key [B, HK, D], the token number length[b] of its row."""
  rows = jnp.arange(key.shape[0])
  block = length // config.block
  held = state.summary.bounds
  at = jnp.minimum(block, held.shape[2] - 1)[:, None, None, None]
  high, low = jnp.split(jnp.take_along_axis(held, at, axis=2)[:, :, 0], 2, axis=-1)
  own = key.astype(held.dtype)
  wider = jnp.concatenate([jnp.maximum(high, own), jnp.minimum(low, own)], axis=-1)
  summary = Summary(held.at[rows, :, block].set(wider, mode='drop'))
  codes, scale, zero = label_of(key[:, :, None], channels)
  labels = Labels(state.labels.codes.at[rows, :, :, length].set(codes[:, :, 0], mode='drop'),
                  state.labels.scale.at[rows, :, length].set(scale[:, :, 0], mode='drop'),
                  state.labels.zero.at[rows, :, length].set(zero[:, :, 0], mode='drop'))
  return State(summary, labels, state.chosen)
