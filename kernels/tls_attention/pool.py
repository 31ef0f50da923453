"""Keys in host memory, with the blocks that decoding reads in a pool on the device.

A step attends over the blocks that the query before chose, while those of this query are on their
way: a copy depends on nothing that the step computes but the choice, so the compiler puts its start
before the attention and its end behind it. Every row and key head has a pool of its own.
arXiv 2604.07815.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels.tls_attention import api, cache
from kernels.tls_attention.config import NONE, Array, Config, State, _record

FREE = -1  # in a slot that holds no block, and for a block that no slot holds


@_record
class Pool:
  """NB blocks in host memory, S slots on the device; the last slot takes what goes nowhere.

  With latent attention there are no values: they are a part of the keys.
  """

  host: tuple[Array, ...]  # [B, HK, NB, block, D] and [.., V], in host memory
  slots: tuple[Array, ...]  # [B, HK, S + 1, block, D] and [.., V]
  slot_of: Array  # i32[B, HK, NB]
  block_of: Array  # i32[B, HK, S]
  used: Array  # i32[B, HK, S], the step that read the slot last
  step: Array  # i32[]


@_record
class Traffic:
  """What a step asked of the host, i32[B, HK] each."""

  wanted: Array  # blocks that the next step will read
  missing: Array  # of these, not in the pool when they were chosen
  waiting: Array  # of these, still not there: more than the copies or the slots of a step
  absent: Array  # blocks that this step should have read and could not


def check(config: Config, slots: int, misses: int) -> None:
  """Raises ValueError naming the argument, the bound and the value."""
  least = config.top_blocks + 1  # and the block that a token opens
  if slots < least:
    raise ValueError(f'slots must be at least top_blocks + 1 = {least}, what a step reads, '
                     f'got {slots}')
  if not 1 <= misses <= config.top_blocks:
    raise ValueError(f'misses must lie in 1..top_blocks = {config.top_blocks}, got {misses}')


def _to_host(x: Array) -> Array:
  return jax.device_put(x, jax.memory.Space.Host)


def _to_device(x: Array) -> Array:
  return jax.device_put(x, jax.memory.Space.Device)


def create(key: Array, value: Array | None, state: State, *, slots: int, config: Config) -> Pool:
  """Pool of a cache [B, HK, N, D], [B, HK, N, V] that holds the blocks in state.chosen.

  Raises ValueError when `slots` are too few for one step.
  """
  check(config, slots, 1)
  rows, heads, room, _ = key.shape
  blocks = room // config.block
  pages = [x.reshape(rows, heads, blocks, config.block, -1)
           for x in (key, value) if x is not None]
  first = jnp.pad(state.chosen, ((0, 0), (0, 0), (0, slots + 1 - config.top_blocks)),
                  constant_values=NONE)
  held = tuple(jnp.take_along_axis(x, jnp.minimum(first, blocks - 1)[..., None, None], axis=2)
               for x in pages)
  real = first[..., :slots] < blocks
  block_of = jnp.where(real, first[..., :slots], FREE)
  empty = jnp.full((rows, heads, blocks), FREE)
  number = jnp.broadcast_to(jnp.arange(slots), block_of.shape)
  return Pool(tuple(map(_to_host, pages)), held, _place(empty, block_of, number), block_of,
              jnp.zeros_like(block_of), jnp.int32(0))


def _place(table: Array, index: Array, value: Array) -> Array:
  """table[b, h, index[b, h, i]] = value[b, h, i] for i32[B, HK, *]; others stay where it is out of
  range."""
  put = lambda t, i, v: t.at[jnp.where(i < 0, t.shape[0], i)].set(v, mode='drop')
  return jax.vmap(jax.vmap(put))(table, index, jnp.broadcast_to(value, index.shape))


def _look_up(table: Array, index: Array) -> Array:
  """table[b, h, index[b, h, i]], FREE where the index is out of range."""
  size = table.shape[-1]
  found = jnp.take_along_axis(table, jnp.clip(index, 0, size - 1), axis=-1)
  return jnp.where((index >= 0) & (index < size), found, FREE)


def _evict(pool: Pool, wanted: Array, keep: Array) -> tuple[Pool, Array]:
  """Slots for blocks i32[B, HK, M] that have none (NONE = no block): (pool, slots i32[B, HK, M]).

  The slots that were read longest ago go first; those with blocks in `keep` stay. S where none is
  left: the block is not placed.
  """
  count = pool.block_of.shape[-1]
  kept = _place(jnp.zeros(pool.slot_of.shape, bool), keep, jnp.array(True))
  held = _look_up(kept.astype(jnp.int32), pool.block_of) > 0
  age = jnp.where(pool.block_of == FREE, jnp.iinfo(jnp.int32).max, pool.step - pool.used)
  order = jnp.where(held, -1, age)
  age, victim = lax.top_k(order, min(wanted.shape[-1], count))
  pad = wanted.shape[-1] - victim.shape[-1]
  age, victim = (jnp.pad(x, ((0, 0), (0, 0), (0, pad)), constant_values=-1) for x in (age, victim))
  taken = (wanted < NONE) & (age >= 0)
  slot = jnp.where(taken, victim, count)
  gone = jnp.where(taken, _look_up(pool.block_of, slot), FREE)
  slot_of = _place(_place(pool.slot_of, gone, jnp.array(FREE)),
                   jnp.where(taken, wanted, FREE), slot)
  return dataclasses.replace(
    pool, slot_of=slot_of, block_of=_place(pool.block_of, slot, wanted),
    used=_place(pool.used, slot, pool.step)), slot


def append(pool: Pool, key: Array, value: Array | None, length: Array, keep: Array, config: Config
           ) -> Pool:
  """Adds a token [B, HK, D] (and [B, HK, V]), number length[b] of its row, to its block's slot.

  A block that it opens takes a slot; the block as it is now goes to the host as well.
  """
  block = jnp.broadcast_to((length // config.block)[:, None, None], (*pool.slot_of.shape[:2], 1))
  new = _look_up(pool.slot_of, block) == FREE
  pool, _ = _evict(pool, jnp.where(new, block, NONE), jnp.concatenate([keep, block], axis=-1))
  slot, inside = _look_up(pool.slot_of, block)[..., 0], length % config.block
  slots, host = list(pool.slots), list(pool.host)
  rows, heads = (x[..., None] if x.ndim == 1 else x for x in (
    jnp.arange(len(length)), jnp.arange(slot.shape[1])[None]))
  for i, new_row in enumerate(x for x in (key, value) if x is not None):
    slots[i] = slots[i].at[rows, heads, slot, inside[:, None]].set(new_row)
    pages = jnp.take_along_axis(slots[i], slot[..., None, None, None], axis=2)
    for b in range(len(length)):
      host[i] = lax.dynamic_update_slice(
        host[i], _to_host(pages[b:b + 1]), (b, 0, length[b] // config.block, 0, 0))
  return dataclasses.replace(pool, host=tuple(host), slots=tuple(slots))


def fetch(pool: Pool, wanted: Array, keep: Array, misses: int) -> tuple[Pool, Array, Array]:
  """At most `misses` of the wanted blocks i32[B, HK, W] come in, the newest first.

  Blocks in `keep`, and the wanted ones that are there, stay. Returns (pool, missing, waiting),
  i32[B, HK]. One copy per row, head and miss, of an address that only the choice knows.
  """
  rows, heads, blocks = pool.slot_of.shape
  lost = (wanted < blocks) & (_look_up(pool.slot_of, wanted) == FREE)
  newest = lax.top_k(jnp.where(lost, wanted, FREE), misses)[0]
  newest = jnp.where(newest >= 0, newest, NONE)
  pool, slot = _evict(pool, newest, jnp.concatenate([keep, wanted], axis=-1))
  slots = list(pool.slots)
  for b in range(rows):
    for h in range(heads):
      for i in range(misses):
        at = jnp.minimum(newest[b, h, i], blocks - 1)
        for n, host in enumerate(pool.host):
          page = _to_device(lax.dynamic_slice(host, (b, h, at, 0, 0), (1, 1, 1, *host.shape[3:])))
          slots[n] = lax.dynamic_update_slice(slots[n], page, (b, h, slot[b, h, i], 0, 0))
  missing = jnp.sum(lost, axis=-1)
  arrived = jnp.sum(slot < pool.block_of.shape[-1], axis=-1)
  return dataclasses.replace(pool, slots=tuple(slots)), missing, missing - arrived


def decode(pool: Pool, state: State, q: Array, key: Array, value: Array | int, *, channels: Array,
           length: Array, config: Config, misses: int, prefetch: bool = True,
           scale: float | None = None, implementation=None
           ) -> tuple[Array, Pool, State, Traffic]:
  """One step: the token [B, HK, D] is added as number length[b], and q [B, HQ, D] reads.

  As `api.decode` behind `cache.append`, over the blocks of the choice that are in the pool. With
  config.stale and `prefetch` the next step's blocks come in during this one; without it a step
  fetches its own first, which changes what it costs and not what it reads, unless copies or slots
  are too few for all. An int V for `value` is the first V channels of the keys.
  """
  check(config, pool.block_of.shape[-1], misses)
  latent, blocks = isinstance(value, int), pool.slot_of.shape[-1]
  pool = append(pool, key, None if latent else value, length, state.chosen, config)
  state = cache.append(state, key, length, channels, config)
  after = api.choose(q, state, length=length + 1, config=config)
  now = state.chosen if config.stale else after.chosen
  ahead = prefetch and config.stale
  if not ahead:
    pool, missing, waiting = fetch(pool, now, now, misses)
  slot = _look_up(pool.slot_of, now)
  there = (slot != FREE) & (now < blocks)
  flat = [x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in pool.slots]
  out = api.read(
    q, flat[0], value if latent else flat[1], state, jnp.where(there, now, NONE),
    jnp.where(there, slot, pool.block_of.shape[-1]), channels=channels, length=length + 1,
    config=config, scale=scale, implementation=implementation)
  pool = dataclasses.replace(pool, step=pool.step + 1,
                             used=_place(pool.used, jnp.where(there, slot, FREE), pool.step + 1))
  if ahead:
    pool, missing, waiting = fetch(pool, after.chosen, now, misses)
  count = functools.partial(jnp.sum, axis=-1)
  return out, pool, after, Traffic(count(after.chosen < blocks), missing, waiting,
                                   count((now < blocks) & ~there))
