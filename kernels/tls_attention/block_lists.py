"""How block-table attention lies in memory: lists of key blocks, each with the rows of one tile.

Dims: B rows, HK key heads, L lists of a key head and tile (query heads that have a table of their
own, or share one too large for a kernel), Tq tiles, R rows of a list (query heads x queries of a
tile), NB blocks, E entries of a list: the tile's own blocks, then the listed ones that count.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class Plan(NamedTuple):
  """Static facts of a call; tokens are padded to whole tiles and blocks."""

  scale: float
  batch: int
  key_heads: int
  lists: int  # L
  shared: int  # query heads of a list
  tile: int
  tiles: int  # Tq
  block: int
  blocks: int  # NB
  entries: int  # E

  @property
  def rows(self) -> int:
    return self.shared * self.tile

  @property
  def own(self) -> int:
    """Blocks that a tile lies in."""
    return own_blocks(self.tile, self.block)


class Facts(NamedTuple):
  """What decides beside the table whether a query sees a key."""

  row_ids: Array  # i32[B, Tq, R], segment ids of the queries; padding has one that no key has
  row_at: Array  # i32[Tq, R], their positions
  key_ids: Array  # i32[B, NB, block], segment ids of the keys, 0 = padding


def own_blocks(tile: int, block: int) -> int:
  return max(tile // block, 1)


def make_plan(query: Array, key: Array, table: Array, *, block: int, tile: int, scale: float,
              most_rows: int | None = None) -> Plan:
  """`most_rows` splits the query heads that share a table into lists of at most so many rows."""
  batch, time, heads, _ = query.shape
  group = heads // key.shape[2]
  shared = group if table.shape[1] == key.shape[2] else 1
  if most_rows is not None:
    shared = max(n for n in range(1, shared + 1)
                 if shared % n == 0 and (n == 1 or n * tile <= most_rows))
  padded = -(-time // max(tile, block)) * max(tile, block)
  return Plan(scale, batch, key.shape[2], group // shared, shared, tile, padded // tile, block,
              padded // block, own_blocks(tile, block) + table.shape[3])


def lay_queries(plan: Plan, x: Array) -> Array:
  """[B, HK, L, Tq, R, D] of [B, T, HQ, D]; the queries of a head lie together."""
  x = jnp.pad(x, ((0, 0), (0, plan.tiles * plan.tile - x.shape[1]), (0, 0), (0, 0)))
  x = x.reshape(plan.batch, plan.tiles, plan.tile, plan.key_heads, plan.lists, plan.shared, -1)
  x = x.transpose(0, 3, 4, 1, 5, 2, 6)
  return x.reshape(*x.shape[:4], plan.rows, -1)


def unlay_queries(plan: Plan, x: Array, time: int) -> Array:
  """Inverse of lay_queries."""
  x = x.reshape(*x.shape[:4], plan.shared, plan.tile, -1).transpose(0, 3, 5, 1, 2, 4, 6)
  return x.reshape(plan.batch, plan.tiles * plan.tile, -1, x.shape[-1])[:, :time]


def lay_keys(plan: Plan, x: Array) -> Array:
  """[B, HK, NB, block, D] of [B, T, HK, D]."""
  x = jnp.pad(x, ((0, 0), (0, plan.blocks * plan.block - x.shape[1]), (0, 0), (0, 0)))
  x = x.reshape(plan.batch, plan.blocks, plan.block, plan.key_heads, -1)
  return x.transpose(0, 3, 1, 2, 4)


def lay_facts(plan: Plan, segment_ids: Array) -> Facts:
  ids = jnp.pad(segment_ids, ((0, 0), (0, plan.tiles * plan.tile - segment_ids.shape[1])))
  rows = jnp.where(ids == 0, jnp.iinfo(jnp.int32).min, ids)
  rows = rows.reshape(plan.batch, plan.tiles, plan.tile)
  at = jnp.arange(plan.tiles * plan.tile, dtype=jnp.int32).reshape(plan.tiles, plan.tile)
  return Facts(jnp.tile(rows, (1, 1, plan.shared)), jnp.tile(at, (1, plan.shared)),
               ids.reshape(plan.batch, plan.blocks, plan.block))


def lay_entries(plan: Plan, table: Array, budget: Array) -> Array:
  """Blocks that each tile attends to, i32[B, HK, L, Tq, E]; NB = none.

  First its own ones, then in rising order the listed ones of rank < budget[b] that end before
  them; a block that stands twice counts once.
  """
  table = jnp.pad(table, ((0, 0), (0, 0), (0, plan.tiles - table.shape[2]), (0, 0)),
                  constant_values=plan.blocks)
  first = jnp.arange(plan.tiles, dtype=jnp.int32) * plan.tile // plan.block
  rank = jnp.arange(table.shape[3])
  counts = (table >= 0) & (table < first[:, None]) & (rank < budget[:, None, None, None])
  listed = lax.sort(jnp.where(counts, table, plan.blocks).astype(jnp.int32), dimension=3)
  again = jnp.pad(listed[..., 1:] == listed[..., :-1], ((0, 0),) * 3 + ((1, 0),))
  listed = jnp.where(again, plan.blocks, listed)
  if table.shape[1] == plan.key_heads:
    listed = jnp.broadcast_to(listed[:, :, None], (*listed.shape[:2], plan.lists,
                                                   *listed.shape[2:]))
  else:
    listed = listed.reshape(plan.batch, plan.key_heads, plan.lists, *listed.shape[2:])
  own = first[:, None] + jnp.arange(plan.own, dtype=jnp.int32)
  own = jnp.broadcast_to(own, (*listed.shape[:4], plan.own))
  return jnp.concatenate([own, listed], axis=-1)
