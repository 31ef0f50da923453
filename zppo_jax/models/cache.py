"""Decoding state: what each mixer remembers of the tokens before. Rows are slots, filled left to
right."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels import tls_attention as tls
from zppo_jax.core import types
from zppo_jax.models.config import DELTA_KINDS, ModelConfig


@types.record
class KeyValue:
  """Keys (rotated) and values of softmax attention."""

  key: types.Array  # [R, B, KV, S, K]
  value: types.Array  # [R, B, KV, S, K]


@types.record
class Latent:
  """Normed latents and rotated shared keys of MLA, side by side."""

  key: types.Array  # [R, B, 1, S, rank + rope]


@types.record
class Sparse:
  """Keys of a layer that decodes at a fixed budget; S is a multiple of the block."""

  rows: KeyValue | Latent
  state: tls.State  # with R in front of every array
  weight: types.Array  # f32[R, B, KV, K], of the channels over the tokens of each row
  channels: types.Array  # i32[R, B, KV, labels], the heaviest when tokens were last appended


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
  """One entry of `layers` per entry of config.slots, each stacked over the repeats of its slot.

  A split cache has an entry of `layers` per layer of the model, without the axis R. It goes with
  `decoder.split_blocks` and a split prefix: layers run one by one, and no weight or key is copied
  out of a stack. With a scalar `length` all its rows are equally long, and one slice is written
  instead of a scatter.
  """

  layers: tuple
  length: types.Array  # i32[B] or i32[], tokens held by each row beyond a prefix
  split: bool = types.static(default=False)


def _key_value(config: ModelConfig, repeats: int, rows: int, size: int) -> KeyValue:
  shape = (repeats, rows, config.kv_heads, size, config.head_dim)
  return KeyValue(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def _latent(config: ModelConfig, repeats: int, rows: int, size: int) -> Latent:
  width = config.mla.rank + config.mla.rope
  return Latent(jnp.zeros((repeats, rows, 1, size, width), config.dtype))


def _maybe_sparse(make, config: ModelConfig, repeats: int, rows: int, size: int):
  """Keys by `make`, with what a fixed budget of them needs where the config has one."""
  if config.sparse is None:
    return make(config, repeats, rows, size)
  kernel, labels = config.sparse.kernel, config.sparse.labels
  keys = make(config, repeats, rows, -(-size // kernel.block) * kernel.block)
  _, _, heads, room, width = keys.key.shape
  state = tls.empty(rows, heads, room, width, labels, kernel, keys.key.dtype)
  return Sparse(keys, jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)), state),
                jnp.zeros((repeats, rows, heads, width)),
                jnp.zeros((repeats, rows, heads, labels), jnp.int32))


def _recurrent(config: ModelConfig, repeats: int, rows: int, size: int) -> Recurrent:
  c, heads = config, config.linear_value_heads
  state = repeats, rows, heads, c.linear_key_dim, c.linear_value_dim
  channels = 2 * c.linear_heads * c.linear_key_dim + heads * c.linear_value_dim
  return Recurrent(jnp.zeros(state, jnp.float32),
                   jnp.zeros((repeats, rows, c.linear_conv - 1, channels), c.dtype))


MIXER_CACHES = {'sliding': _key_value, 'full': functools.partial(_maybe_sparse, _key_value),
                'mla': functools.partial(_maybe_sparse, _latent)} | dict.fromkeys(
  DELTA_KINDS, _recurrent)
KV_AXES = ('layers', 'batch', 'kv_heads', None, 'head_dim')
RECURRENT_AXES = Recurrent(('layers', 'batch', 'heads', None, None),
                           ('layers', 'batch', None, None))


def init(config: ModelConfig, rows: int, size: int) -> Cache:
  """Empty cache for `rows` sequences of at most `size` tokens."""
  layers = tuple(MIXER_CACHES[s.mixer](config, s.repeats, rows, size) for s in config.slots)
  return Cache(layers, jnp.zeros((rows,), jnp.int32))


def split(config: ModelConfig, rows: int, size: int, prefix: Prefix | None = None) -> Cache:
  """Split cache that is empty, or goes on from a prefix [not split] of rows / P samples each."""
  layers = init(config, rows, size).layers
  if prefix is not None:
    layers = tuple(_go_on(own, shared, rows) for own, shared in zip(layers, prefix.layers))
  return Cache(unstack(config, layers), jnp.int32(0), split=True)


def _go_on(empty, shared, rows: int):
  """Attention looks at the prefix itself; a recurrent state is carried on by each row."""
  if not isinstance(empty, Recurrent):
    return empty
  return jax.tree.map(lambda x: jnp.repeat(x, rows // x.shape[1], axis=1), shared)


def whole(config: ModelConfig, prompts: Cache, group: int, size: int) -> Cache:
  """Split cache of `size` columns whose rows hold their prompt themselves, `group` rows of each."""
  def put(empty, held):
    held = jnp.repeat(held, group, axis=1)
    return jax.lax.dynamic_update_slice(empty, held, (0,) * held.ndim)

  layers = init(config, len(prompts.length) * group, size).layers
  return Cache(unstack(config, jax.tree.map(put, layers, prompts.layers)),
               jnp.repeat(prompts.length, group), split=True)


def as_prefix(prompts: Cache) -> Prefix:
  return Prefix(prompts.layers, prompts.length)


def split_prefix(config: ModelConfig, prefix: Prefix) -> Prefix:
  """A prefix for a split cache."""
  return Prefix(unstack(config, prefix.layers), prefix.length)


def unstack(config: ModelConfig, stacks) -> tuple:
  """One tree per layer, of one stack per slot."""
  places = map(config.place_of, range(config.layers))
  return tuple(jax.tree.map(lambda x, r=r: x[r], stacks[n]) for n, r in places)
