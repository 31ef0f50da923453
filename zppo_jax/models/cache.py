"""Decoding state: what each mixer remembers of the tokens before. Rows are slots, filled left to
right."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zppo_jax.core import types
from zppo_jax.models.config import ModelConfig


@types.record
class KeyValue:
  """Keys (rotated) and values of softmax attention."""

  key: types.Array  # [R, B, S, KV, K]
  value: types.Array  # [R, B, S, KV, K]


@types.record
class Cache:
  """One entry of `layers` per entry of config.mixers, each stacked over config.repeats."""

  layers: tuple[KeyValue, ...]
  length: types.Array  # i32[B], tokens held by each row


def _key_value(config: ModelConfig, rows: int, size: int) -> KeyValue:
  shape = (config.repeats, rows, size, config.kv_heads, config.head_dim)
  return KeyValue(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


MIXER_CACHES = {'full': _key_value}
KV_AXES = ('layers', 'batch', None, 'kv_heads', 'head_dim')


def init(config: ModelConfig, rows: int, size: int) -> Cache:
  """Empty cache for `rows` sequences of at most `size` tokens."""
  layers = tuple(MIXER_CACHES[m](config, rows, size) for m in config.mixers)
  return Cache(layers, jnp.zeros((rows,), jnp.int32))


def repeat_rows(cache: Cache, times: int) -> Cache:
  """Each row `times` times in a row: one prefill serves all samples of a group."""
  layers = jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), cache.layers)
  return Cache(layers, jnp.repeat(cache.length, times))


def grow(cache: Cache, size: int) -> Cache:
  """Room for `size` tokens per row."""
  def pad(x):
    return jnp.pad(x, ((0, 0), (0, 0), (0, size - x.shape[2]), (0, 0), (0, 0)))

  return Cache(jax.tree.map(pad, cache.layers), cache.length)
