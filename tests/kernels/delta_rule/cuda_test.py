"""The GPU kernels, forward and backward, become Triton code on a host without a GPU."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

from kernels import delta_rule as lib

CALL = '__gpu$xla.gpu.triton'


def shape(*size, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(size, dtype)


@pytest.mark.parametrize('key, value, dtype', [(128, 128, 'bfloat16'), (64, 128, 'float32'),
                                               (256, 24, 'bfloat16')])
def test_kernels_lower_for_cuda(key, value, dtype):
  size, heads = (1, 8192), 4
  keys = [shape(*size, h, key, dtype=dtype) for h in (2, 2, heads)]
  arguments = (*keys, shape(*size, heads, value, dtype=dtype), shape(*size, heads, key))

  def loss(arguments, segments):
    out, state = lib.delta_rule(*arguments, segment_ids=segments, implementation='pallas_gpu')
    return out.astype(jnp.float32).sum() + state.sum()

  gpu = jax.sharding.AbstractDevice('NVIDIA H200', None, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=gpu)
  with jax.sharding.use_abstract_mesh(mesh):
    done = export.export(jax.jit(jax.value_and_grad(loss)), platforms=['cuda'],
                         disabled_checks=[export.DisabledSafetyCheck.custom_call(CALL)])(
      arguments, shape(*size, dtype=jnp.int32))
  text = str(done.mlir_module())
  for name in ('pairs', 'forward', 'states', 'states_backward', 'keys_backward'):
    assert f'"delta_rule_{name}"' in text, name
  assert text.count(f'@{CALL}') == 6  # the pairs in both directions
