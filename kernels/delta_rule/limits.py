"""What the Pallas kernels of both back ends share: their limits and the precision of products."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.common import dispatch

LARGEST = 256  # K and V


class Passes(NamedTuple):
  """bfloat16 passes of a product: 1 rounds the operands, 3 keeps about 16 bits, 6 keeps float32."""

  pair: int  # products of rows, and what the output alone reads
  solve: int  # the inverse and its product with the values
  state: int  # what is read from the state into values, and what enters it


EXACT = Passes(6, 6, 6)  # of float32 inputs
MIXED = Passes(1, 3, 3)  # of bfloat16 inputs


def default_passes(dtype) -> Passes:
  return EXACT if dtype == jnp.float32 else MIXED


def check(platform: str, interpret: bool | None, q: jax.Array, value: jax.Array) -> bool:
  """`dispatch.require`, and sizes that the kernels have."""
  interpret = dispatch.require(platform, interpret, q.dtype)
  if max(q.shape[3], value.shape[3]) > LARGEST:
    raise NotImplementedError(f'K={q.shape[3]}, V={value.shape[3]}: at most {LARGEST}')
  return interpret
