"""Static facts of two-level sparse attention, and the records that decoding carries along.

Dims: B rows, HQ query heads, HK key heads, D their width, N tokens of room, NB = N / block blocks,
R channels of a label. Query heads share the choice of their key head.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

Array = jax.Array


NONE = 2**20  # stands for no block in lists of blocks, whatever their number


@dataclasses.dataclass(frozen=True)
class Config:
  """What a decode step may read. `sink_blocks` at the start and the block being filled are always
  among the `top_blocks`; `stale` looks into the blocks that the query before chose."""

  block: int = 64
  top_blocks: int = 128
  top_tokens: int = 1024
  sink_blocks: int = 1
  reduce: Literal['softmax_max', 'max_logit'] = 'softmax_max'  # over the query heads of a key head
  stale: bool = False

  @property
  def candidates(self) -> int:
    """Tokens that the second level looks at."""
    return self.block * self.top_blocks


def _record(cls):
  cls = dataclasses.dataclass(frozen=True)(cls)
  return jax.tree_util.register_dataclass(cls, [f.name for f in dataclasses.fields(cls)], [])


@_record
class Summary:
  """Largest and smallest key per block and channel, side by side.

  An empty block has the least and the largest finite number, so that 0 times a bound is 0.
  """

  bounds: Array  # [B, HK, NB, 2 D], the largest first


@_record
class Labels:
  """R channels of every key at 4 bits: code = round((x - zero) / scale), two codes a byte.

  Byte c holds channel c in its low half and channel c + R / 2 in its high half. Tokens lie along
  the last axis, so that no back end pads or copies the array.
  """

  codes: Array  # u8[B, HK, R / 2, N]
  scale: Array  # f32[B, HK, N]
  zero: Array  # f32[B, HK, N]


@_record
class State:
  """What decoding keeps beside keys and values."""

  summary: Summary
  labels: Labels
  chosen: Array  # i32[B, HK, top_blocks], by the query before; NONE where there are fewer


def problems(c: Config) -> list[str]:
  """Everything that is wrong with the settings, as 'name must ..., got ...' lines."""
  found = []
  for name in ('block', 'top_blocks', 'top_tokens'):
    if getattr(c, name) < 1:
      found.append(f'{name} must be at least 1, got {getattr(c, name)}')
  if c.block % 8:
    found.append(f'block must be a multiple of 8, got {c.block}')
  if c.top_tokens > c.candidates:
    found.append(f'top_tokens must be at most top_blocks * block = {c.candidates}, '
                 f'got {c.top_tokens}')
  most = c.top_blocks - 1 - c.stale  # beside the last block, and the next one
  if not 0 <= c.sink_blocks <= most:
    found.append(f'sink_blocks must lie in 0..{most} with top_blocks = {c.top_blocks}, '
                 f'got {c.sink_blocks}')
  if c.reduce not in ('softmax_max', 'max_logit'):
    found.append(f"reduce must be 'softmax_max' or 'max_logit', got {c.reduce!r}")
  return found


def check(c: Config, q: Array, key: Array, channels: Array) -> None:
  """Raises ValueError naming the argument, the bound and the value."""
  rows, heads, width = q.shape
  found = problems(c)
  if key.shape[:1] + key.shape[3:] not in ((rows, width), (rows, 2, width)):
    found.append(f'key must be [B={rows}, HK, N, D={width}], or packed [.., N, 2, D], '
                 f'got {key.shape}')
  elif heads % key.shape[1]:
    found.append(f'HQ = {heads} must be a multiple of HK = {key.shape[1]}')
  elif not found and key.shape[2] % c.block:
    found.append(f'N must be a multiple of block = {c.block}, got {key.shape[2]}')
  found += problems_of_channels(channels, key)
  if found:
    raise ValueError('tls_attention: ' + '; '.join(found))


def per_row(channels: Array) -> Array:
  """Channels [B or 1, HK, R], whether every row has its own or all share them."""
  return channels if channels.ndim == 3 else channels[None]


def problems_of_channels(channels: Array, key: Array) -> list[str]:
  """What is wrong with calibrated channels i32[HK, R] or i32[B, HK, R], if anything."""
  heads, count = key.shape[:2], channels.shape[-1]
  if channels.shape[:-1] not in (heads, heads[1:]):
    return [f'channels must be [HK={heads[1]}, R] as `calibrate` gives them, or one such for each '
            f'of B={heads[0]} rows, got {channels.shape}']
  if count % 2 or not 2 <= count <= key.shape[-1]:
    return [f'channels: R must be even and in 2..D = {key.shape[-1]}, got {count}']
  return []
