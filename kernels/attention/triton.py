"""JAX's Triton attention on GPU; no window, no soft cap."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as kernels

from kernels.common import dispatch

Array = jax.Array
BLOCK = 64  # of queries and of keys


def attention(query: Array, key: Array, value: Array, *, segment_ids: Array, scale: float,
              window: int, cap: float | None, interpret: bool | None = None) -> Array:
  """Arguments as `api.attention` prepares them; grouped key heads are repeated.

  `interpret` runs the kernel as XLA operations, by default False: then only a GPU can run it.
  Raises NotImplementedError where it cannot run.
  """
  interpret = dispatch.require('gpu', interpret, query.dtype)
  if window or cap is not None:
    raise NotImplementedError(f'no window and no soft cap, got window={window}, cap={cap}')
  if query.shape[3] != value.shape[3]:
    raise NotImplementedError(f'K={query.shape[3]}, V={value.shape[3]}: K = V is needed')
  time = query.shape[1]
  padded = math.ceil(time / BLOCK) * BLOCK
  repeats = query.shape[2] // key.shape[2]
  wide = ((0, 0), (0, padded - time), (0, 0), (0, 0))
  query, key, value = (jnp.pad(x, wide) for x in (
    query, jnp.repeat(key, repeats, axis=2), jnp.repeat(value, repeats, axis=2)))
  sizes = kernels.BlockSizes(*[BLOCK] * 6)
  out = kernels.mha(query, key, value, jnp.pad(segment_ids, wide[:2]), sm_scale=scale, causal=True,
                    block_sizes=sizes, interpret=interpret)
  return out[:, :time]
