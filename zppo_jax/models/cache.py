"""Decoding state: what each mixer remembers of the tokens before. Rows are slots, filled left to
right."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zppo_jax.core import types
from zppo_jax.models.config import DELTA_KINDS, ModelConfig


@types.record
class KeyValue:
  """Keys (rotated) and values of softmax attention."""

  key: types.Array  # [R, B, KV, S, K]
  value: types.Array  # [R, B, KV, S, K]


@types.record
class Recurrent:
  """State of a linear attention and the last inputs of its short convolution."""

  state: types.Array  # f32[R, B, HV, K, V]
  conv: types.Array  # [R, B, W - 1, C]


@types.record
class Prefix:
  """What the rows of a group have in common, kept once per group: P prompts of at most L tokens.

  The rows that follow it stand group by group, B = P * G.
  """

  layers: tuple  # as of a cache, with P rows
  length: types.Array  # i32[P]


@types.record
class Cache:
  """One entry of `layers` per entry of config.mixers, each stacked over config.repeats.

  A split cache has an entry of `layers` per repeat, each a tuple over config.mixers without the
  axis R, and a scalar `length`: all rows are equally long, so one slice is written instead of a
  scatter. It goes with `decoder.split_blocks` and a split prefix: blocks run one by one, and no
  weight or key is copied out of a stack.
  """

  layers: tuple
  length: types.Array  # i32[B] or i32[], tokens held by each row beyond a prefix
  split: bool = types.static(default=False)


def _key_value(config: ModelConfig, rows: int, size: int) -> KeyValue:
  shape = (config.repeats, rows, config.kv_heads, size, config.head_dim)
  return KeyValue(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def _recurrent(config: ModelConfig, rows: int, size: int) -> Recurrent:
  c, heads = config, config.linear_value_heads
  state = c.repeats, rows, heads, c.linear_key_dim, c.linear_value_dim
  channels = 2 * c.linear_heads * c.linear_key_dim + heads * c.linear_value_dim
  return Recurrent(jnp.zeros(state, jnp.float32),
                   jnp.zeros((c.repeats, rows, c.linear_conv - 1, channels), c.dtype))


MIXER_CACHES = {'full': _key_value} | dict.fromkeys(DELTA_KINDS, _recurrent)
KV_AXES = ('layers', 'batch', 'kv_heads', None, 'head_dim')
RECURRENT_AXES = Recurrent(('layers', 'batch', 'heads', None, None),
                           ('layers', 'batch', None, None))


def init(config: ModelConfig, rows: int, size: int) -> Cache:
  """Empty cache for `rows` sequences of at most `size` tokens."""
  layers = tuple(MIXER_CACHES[m](config, rows, size) for m in config.mixers)
  return Cache(layers, jnp.zeros((rows,), jnp.int32))


def split(config: ModelConfig, rows: int, size: int, prefix: Prefix | None = None) -> Cache:
  """Split cache that is empty, or goes on from a prefix [not split] of rows / P samples each."""
  layers = init(config, rows, size).layers
  if prefix is not None:
    layers = tuple(_go_on(own, shared, rows) for own, shared in zip(layers, prefix.layers))
  return Cache(unstack(layers, config.repeats), jnp.int32(0), split=True)


def _go_on(empty, shared, rows: int):
  """Attention looks at the prefix itself; a recurrent state is carried on by each row."""
  if not isinstance(empty, Recurrent):
    return empty
  return jax.tree.map(lambda x: jnp.repeat(x, rows // x.shape[1], axis=1), shared)


def as_prefix(prompts: Cache) -> Prefix:
  return Prefix(prompts.layers, prompts.length)


def split_prefix(config: ModelConfig, prefix: Prefix) -> Prefix:
  """A prefix for a split cache."""
  return Prefix(unstack(prefix.layers, config.repeats), prefix.length)


def unstack(tree, count: int) -> tuple:
  """Trees of the `count` entries of the leading axis."""
  return tuple(jax.tree.map(lambda x, r=r: x[r], tree) for r in range(count))
