"""Splash attention, forward and backward, is what a TPU runs by default; lowered without one."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

from kernels import attention


@pytest.mark.parametrize('window, cap, size', [(0, None, 128), (1024, 50.0, 256), (0, None, 64)])
def test_splash_lowers_for_tpu(window, cap, size):
  query = jax.ShapeDtypeStruct((2, 4000, 8, size), 'bfloat16')
  key = jax.ShapeDtypeStruct((2, 4000, 2, size), 'bfloat16')
  ids = jax.ShapeDtypeStruct((2, 4000), jnp.int32)

  def loss(arrays, ids):
    out = attention.attention(*arrays, segment_ids=ids, window=window, cap=cap)
    return out.astype(jnp.float32).sum()

  tpu = jax.sharding.AbstractDevice('TPU v5', 1, 'tpu')
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=tpu)
  with jax.sharding.use_abstract_mesh(mesh):
    done = export.export(jax.jit(jax.value_and_grad(loss)), platforms=['tpu'])(
      (query, key, key), ids)
  assert str(done.mlir_module()).count('@tpu_custom_call') == 3  # out, dq, dk and dv
