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
import numpy as np
from jax import lax

from kernels.tls_attention import api, cache
from kernels.tls_attention.config import NONE, Array, Config, State, _record

FREE = -1  # in a slot that holds no block, and for a block that no slot holds


@_record
class Pool:
  """NB blocks in host memory, S slots on the device; a last one of each takes what goes nowhere.

  With latent attention there are no values: they are a part of the keys.
  """

  host: tuple[Array, ...]  # [B, NB + 1, HK, block, D] and [.., V], in host memory
  slots: tuple[Array, ...]  # [B, HK, S + 1, block, D] and [.., V]
  slot_of: Array  # i32[B, HK, NB]
  block_of: Array  # i32[B, HK, S]
  used: Array  # i32[B, HK, S], the step that read the slot last
  step: Array  # i32[]


@_record
class Traffic:
  """What a step, or many, asked of the host, i32[B, HK] each."""

  wanted: Array  # blocks that the next step will read
  missing: Array  # of these, not in the pool when they were chosen
  waiting: Array  # of these, still not there: more than the copies or the slots of a step
  absent: Array  # blocks that this step should have read and could not


def check(config: Config, slots: int, misses: int) -> None:
  """Raises ValueError naming all arguments that do not fit, the bound and the value."""
  lines = problems(config, slots, misses)
  if lines:
    raise ValueError('\n'.join(lines))


def problems(config: Config, slots: int, misses: int) -> list[str]:
  """Everything that is wrong with the sizes of a pool, as 'argument reason' lines."""
  least, found = config.top_blocks + 1, []  # and the block that a token opens
  if slots < least:
    found.append(f'slots must be at least top_blocks + 1 = {least}, what a step reads, '
                 f'got {slots}')
  if not 1 <= misses <= config.top_blocks:
    found.append(f'misses must lie in 1..top_blocks = {config.top_blocks}, got {misses}')
  return found


def _to_host(x: Array) -> Array:
  return jax.device_put(x, jax.memory.Space.Host)


def _to_device(x: Array) -> Array:
  return jax.device_put(x, jax.memory.Space.Device)


def create(key: Array, value: Array | None, state: State, *, slots: int, config: Config) -> Pool:
  """Pool of a cache [B, HK, N, D], [B, HK, N, V] that holds the blocks in state.chosen.

  Raises ValueError when `slots` are too few for one step.
  """
  check(config, slots, 1)
  pages = _cut(key, value, config)
  blocks = pages[0].shape[1]
  held, slot_of, block_of = _first(pages, state.chosen, slots, blocks)
  spare = ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0))
  host = tuple(_to_host(jnp.pad(x, spare)) for x in pages)
  return Pool(host, held, slot_of, block_of, jnp.zeros_like(block_of), jnp.int32(0))


def insert(pool: Pool, key: Array, value: Array | None, chosen: Array, target: Array, config: Config
           ) -> Pool:
  """Row target[i] holds row i of [R, HK, L, D], [R, HK, L, V] and of chosen i32[R, HK, top_blocks].

  L a multiple of the block and at most the room; a target outside 0..B-1 goes nowhere.
  """
  rows, _, blocks = pool.slot_of.shape
  pages = _cut(key, value, config)
  held, *tables = _first(pages, chosen, pool.block_of.shape[-1], blocks)
  real = (target >= 0) & (target < rows)
  at = jnp.where(real, target, rows)
  put = lambda old, new: old.at[at].set(new, mode='drop')
  host = [_pages(x) for x in pool.host]
  for n, x in enumerate(pages):
    for i in range(len(target)):
      start = jnp.clip(target[i], 0, rows - 1) * (blocks + 1), 0, 0, 0
      old = _to_device(lax.dynamic_slice(host[n], start, x.shape[1:]))
      host[n] = lax.dynamic_update_slice(
        host[n], _to_host(jnp.where(real[i], x[i], old)), start)
  slot_of, block_of = map(put, (pool.slot_of, pool.block_of), tables)
  return Pool(_like(host, pool.host), tuple(map(put, pool.slots, held)), slot_of, block_of,
              put(pool.used, jnp.broadcast_to(pool.step, tables[1].shape)), pool.step)


def _cut(key: Array, value: Array | None, config: Config) -> list[Array]:
  """Keys and values [B, HK, N, ..] as pages [B, N / block, HK, block, ..]."""
  cut = lambda x: x.reshape(*x.shape[:2], -1, config.block, x.shape[-1])
  return [jnp.swapaxes(cut(x), 1, 2) for x in (key, value) if x is not None]


def _first(pages: list[Array], chosen: Array, slots: int, blocks: int):
  """(slots, slot_of, block_of) that hold the chosen blocks of pages."""
  first = jnp.pad(chosen, ((0, 0), (0, 0), (0, slots + 1 - chosen.shape[-1])),
                  constant_values=NONE)
  rows, heads = chosen.shape[:2]
  at = jnp.minimum(first, pages[0].shape[1] - 1)
  place = jnp.arange(rows)[:, None, None], at, jnp.arange(heads)[None, :, None]
  block_of = jnp.where(first[..., :slots] < blocks, first[..., :slots], FREE)
  slot_of = _place(jnp.full((rows, heads, blocks), FREE), block_of, jnp.arange(slots))
  return tuple(x[place] for x in pages), slot_of, block_of


def _place(table: Array, index: Array, value: Array) -> Array:
  """table[b, h, index[b, h, i]] = value[.., i] for i32[B, HK, *]; others stay where it is out of
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

  A block that it opens takes a slot; the block as it is now goes to the host as well. A row whose
  length is the room takes none.
  """
  rows, heads, blocks = pool.slot_of.shape
  at = jnp.minimum(length // config.block, blocks)
  block = jnp.broadcast_to(at[:, None, None], (rows, heads, 1))
  new = (block < blocks) & (_look_up(pool.slot_of, block) == FREE)
  pool, _ = _evict(pool, jnp.where(new, block, NONE), jnp.concatenate([keep, block], axis=-1))
  slot, inside = _look_up(pool.slot_of, block)[..., 0], length % config.block
  slot = jnp.where(slot == FREE, pool.block_of.shape[-1], slot)
  slots, host = list(pool.slots), [_pages(x) for x in pool.host]
  place = jnp.arange(rows)[:, None], jnp.arange(heads)[None], slot
  for i, new_row in enumerate(x for x in (key, value) if x is not None):
    slots[i] = slots[i].at[*place, inside[:, None]].set(new_row)
    pages = slots[i][place]
    for b in range(rows):
      host[i] = lax.dynamic_update_slice(
        host[i], _to_host(pages[b:b + 1]), (b * (blocks + 1) + at[b], 0, 0, 0))
  return dataclasses.replace(pool, host=_like(host, pool.host), slots=tuple(slots))


def _pages(host: Array) -> Array:
  """The pages of all rows behind each other: a copy has one moving index, which TPUs want."""
  return host.reshape(-1, *host.shape[2:])


def _like(pages, host: tuple[Array, ...]) -> tuple[Array, ...]:
  return tuple(x.reshape(old.shape) for x, old in zip(pages, host))


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
  slots, pages = list(pool.slots), [_pages(x) for x in pool.host]
  for b, h, i in np.ndindex(rows, heads, misses):
    at = b * (blocks + 1) + jnp.minimum(newest[b, h, i], blocks)
    for n, host in enumerate(pages):
      page = _to_device(lax.dynamic_slice(host, (at, h, 0, 0), (1, 1, *host.shape[2:])))
      slots[n] = lax.dynamic_update_slice(slots[n], page[None], (b, h, slot[b, h, i], 0, 0))
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
  are too few for all. An int V for `value` is the first V channels of the keys. A row whose length
  is the room waits: it takes no token and keeps its choice.
  """
  check(config, pool.block_of.shape[-1], misses)
  latent, blocks = isinstance(value, int), pool.slot_of.shape[-1]
  pool = append(pool, key, None if latent else value, length, state.chosen, config)
  state = cache.append(state, key, length, channels, config)
  after = api.choose(q, state, length=length + 1, config=config)
  waits = (length >= blocks * config.block)[:, None, None]
  after = dataclasses.replace(after, chosen=jnp.where(waits, state.chosen, after.chosen))
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
