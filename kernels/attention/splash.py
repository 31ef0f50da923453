"""Splash attention of JAX on TPU: blocks above the diagonal or outside the window cost nothing."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)

from kernels.common import dispatch

Array = jax.Array
LANES = 128
BLOCK = 512  # of queries and of keys, less in short rows


def attention(query: Array, key: Array, value: Array, *, segment_ids: Array, scale: float,
              window: int, cap: float | None, interpret: bool | None = None) -> Array:
  """Arguments as `api.attention` prepares them; rows and sizes are padded to multiples of 128.

  `interpret` runs the kernel as XLA operations, by default False: then only a TPU can run it.
  Raises NotImplementedError where it cannot run.
  """
  interpret = dispatch.require('tpu', interpret, query.dtype)
  time, heads, width = query.shape[1], query.shape[2], value.shape[3]
  block = BLOCK if time > BLOCK else _up(time, LANES)
  padded = _up(time, block)
  mask = masks.LocalMask((padded, padded), (window - 1, 0), 0) if window else masks.CausalMask(
    (padded, padded))
  run = kernels.make_splash_mha(
    mask=masks.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1,
    attn_logits_soft_cap=cap, interpret=interpret, block_sizes=kernels.BlockSizes(
      block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
      block_q_dq=block, block_kv_dq=block))

  def row(q, k, v, ids):
    return run(q, k, v, segment_ids=kernels.SegmentIds(ids, ids))

  query = (query.astype(jnp.float32) * scale).astype(query.dtype)
  inputs = (jnp.swapaxes(_pad(x, padded), 1, 2) for x in (query, key, value))
  ids = jnp.pad(segment_ids, ((0, 0), (0, padded - time)))
  out = jax.vmap(row)(*inputs, ids)  # [B, H, T, V]
  return jnp.swapaxes(out, 1, 2)[:, :time, :, :width].astype(value.dtype)


def _up(size: int, multiple: int) -> int:
  return math.ceil(size / multiple) * multiple


def _pad(x: Array, time: int) -> Array:
  size = _up(x.shape[3], LANES)
  return jnp.pad(x, ((0, 0), (0, time - x.shape[1]), (0, 0), (0, size - x.shape[3])))
