"""Products in kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
  """a . b over axis contract[0] of a and contract[1] of b, in float32, as exact as the operands.

  The default rounds float32 operands to bfloat16; products of bfloat16 operands are exact.
  """
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
  dims = (((contract[0],), (contract[1],)), ((), ()))
  return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
