"""Decoding state: what each mixer remembers of the tokens before. Rows are slots, filled left to
right."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels import tls_attention as tls
from zppo_jax.core import types
from zppo_jax.mesh import axes
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

  rows: KeyValue | Latent | tls.pool.Pool  # a pool only in a split cache
  state: tls.State  # with R in front of every array
  weight: types.Array  # f32[R, B, KV, K], of the channels over the tokens of each row
  channels: types.Array  # i32[R, B, KV, labels], the heaviest when tokens were last appended
  traffic: tls.pool.Traffic | None = None  # of a pool, since the prompt


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
  keys = make(config, repeats, rows, sparse_room(config, size))
  books = sparse_books(config, *keys.key.shape[1:], keys.key.dtype)
  return Sparse(keys, *jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)), books))


def sparse_room(config: ModelConfig, size: int) -> int:
  """Columns that hold `size` tokens: a multiple of the block."""
  block = config.sparse.kernel.block
  return -(-size // block) * block


def sparse_books(config: ModelConfig, rows: int, heads: int, room: int, width: int, dtype):
  """(state, weight, channels) of a `Sparse` layer that holds nothing, without the axis R."""
  kernel, labels = config.sparse.kernel, config.sparse.labels
  return (tls.empty(rows, heads, room, width, labels, kernel, dtype),
          jnp.zeros((rows, heads, width)), jnp.zeros((rows, heads, labels), jnp.int32))


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
  """Split cache of `size` columns whose rows hold their prompt themselves, `group` rows of each.

  Keys that a pool is for go to host memory, layer by layer.
  """
  def put(empty, held):
    held = jnp.repeat(held, group, axis=0)
    return jax.lax.dynamic_update_slice(empty, held, (0,) * held.ndim)

  empty = unstack(config, init(config, len(prompts.length) * group, size).layers)
  held = prompts.layers if prompts.split else unstack(config, prompts.layers)
  layers = (jax.tree.map(put, *pair) for pair in zip(empty, held))
  return Cache(tuple(offload(config, layer) for layer in layers),
               jnp.repeat(prompts.length, group), split=True)


def offload(config: ModelConfig, layer):
  """A layer of a split cache with its keys in host memory, where the config has a pool for them."""
  if not isinstance(layer, Sparse) or not config.pooled:
    return layer
  given, tree = jax.tree.flatten((layer.rows, layer.state))

  def create(*leaves):
    rows, state = jax.tree.unflatten(tree, leaves)
    return tuple(jax.tree.leaves(tls.pool.create(
      rows.key, getattr(rows, 'value', None), state, slots=config.sparse.pool,
      config=config.sparse.kernel)))

  n = len(jax.tree.leaves(layer.rows))
  made = axes.on_shards(create, list(map(row_axes, given)), pool_axes(n))(*given)
  zero = jnp.zeros(layer.weight.shape[:2], jnp.int32)
  return dataclasses.replace(layer, rows=tls.pool.Pool(made[:n], made[n:2 * n], *made[2 * n:]),
                             traffic=tls.pool.Traffic(zero, zero, zero, zero))


def enter(config: ModelConfig, layer, prompts, target: jax.Array, source: jax.Array):
  """A layer of a split cache whose row target[i] (or none: B and more) is row source[i] of the same
  layer of shorter prompts."""
  def put(old, new):  # states of a recurrence, or the first columns of a cache of keys
    first = tuple(slice(0, n) for n in new.shape[1:])
    return old.at[(target, *first)].set(new[source], mode='drop')

  if not isinstance(layer, Sparse) or not config.pooled:
    return jax.tree.map(put, layer, prompts)
  keys = jax.tree.map(lambda x: x[source], (prompts.rows, prompts.state.chosen))
  keys, tree = jax.tree.flatten(keys)
  pool, pool_tree = jax.tree.flatten(layer.rows)

  def insert(number, target, *leaves):
    rows, chosen = jax.tree.unflatten(tree, leaves[:len(keys)])
    pool = jax.tree.unflatten(pool_tree, leaves[len(keys):])
    return tuple(jax.tree.leaves(tls.pool.insert(
      pool, rows.key, getattr(rows, 'value', None), chosen, target - number[0],
      config.sparse.kernel)))

  names = pool_axes(len(layer.rows.host))
  ins = [('batch',), (None,), *((None, *row_axes(x)[1:]) for x in keys), *names]
  pool = axes.on_shards(insert, ins, names)(
    jnp.arange(len(layer.weight)), target, *keys, *pool)
  books = jax.tree.map(put, *(dataclasses.replace(x, rows=None, traffic=None)
                              for x in (layer, prompts)))
  traffic = jax.tree.map(lambda x: x.at[target].set(0, mode='drop'), layer.traffic)
  return dataclasses.replace(books, rows=jax.tree.unflatten(pool_tree, pool), traffic=traffic)


def traffic(cache: Cache) -> jax.Array | None:
  """i32[B, 4] of `Traffic` over all layers and heads since the prompt; None without a pool."""
  found = [x.traffic for x in cache.layers if isinstance(x, Sparse) and x.traffic is not None]
  if not found:
    return None
  return sum(jnp.stack([jnp.sum(x, axis=1) for x in (t.wanted, t.missing, t.waiting, t.absent)],
                       axis=1) for t in found)


def row_axes(x) -> tuple[str | None, ...]:
  """Logical axes of arrays [B, KV, ..]."""
  return 'batch', 'kv_heads', *(None,) * (x.ndim - 2)


def pool_axes(arrays: int) -> list[tuple[str | None, ...]]:
  """Logical axes of the leaves of a pool of keys (1 array), or of keys and values (2)."""
  host, slots = ('batch', None, 'kv_heads', None, None), ('batch', 'kv_heads', None, None, None)
  return [host] * arrays + [slots] * arrays + [('batch', 'kv_heads', None)] * 3 + [()]


def as_prefix(prompts: Cache) -> Prefix:
  return Prefix(prompts.layers, prompts.length)


def split_prefix(config: ModelConfig, prefix: Prefix) -> Prefix:
  """A prefix for a split cache."""
  return Prefix(unstack(config, prefix.layers), prefix.length)


def unstack(config: ModelConfig, stacks) -> tuple:
  """One tree per layer, of one stack per slot."""
  places = map(config.place_of, range(config.layers))
  return tuple(jax.tree.map(lambda x, r=r: x[r], stacks[n]) for n, r in places)
