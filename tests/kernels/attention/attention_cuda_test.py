"""JAX's Triton attention, forward and backward, becomes Triton code on a host without a GPU."""

import jax
import jax.numpy as jnp
from jax import export

from kernels import attention

CALL = '__gpu$xla.gpu.triton'


def test_triton_lowers_for_cuda():
  query = jax.ShapeDtypeStruct((1, 4096, 4, 128), 'bfloat16')
  key = jax.ShapeDtypeStruct((1, 4096, 2, 128), 'bfloat16')
  ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

  def loss(arrays, ids):
    out = attention.attention(*arrays, segment_ids=ids, implementation='triton')
    return out.astype(jnp.float32).sum()

  gpu = jax.sharding.AbstractDevice('NVIDIA H200', None, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=gpu)
  with jax.sharding.use_abstract_mesh(mesh):
    done = export.export(jax.jit(jax.value_and_grad(loss)), platforms=['cuda'],
                         disabled_checks=[export.DisabledSafetyCheck.custom_call(CALL)])(
      (query, key, key), ids)
  text = str(done.mlir_module())
  for name in ('mha_forward', 'mha_preprocess_backward', 'mha_backward'):
    assert f'"{name}"' in text, name
