"""The TPU kernels of block-table attention, forward and backward, compiled for their chips."""

import json
import sys

import child
import jax
import jax.numpy as jnp
import pytest

from kernels import tls_attention as tls

TIME = 8192


def compile_for(topology, sizes):
  """Bytes of temporaries and of arrays of forward and backward, compiled for a TPU."""
  from jax.experimental import topologies
  time, heads, kv, width, value, own, block, entries, dtype = sizes
  device = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[0]
  mesh = jax.sharding.Mesh([device], ('x',))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  struct = lambda shape, kind=dtype: jax.ShapeDtypeStruct(shape, kind, sharding=place)

  def run(arrays, d_out, table, budget, ids):
    def rule(*arrays):
      return tls.block_attention(*arrays, table, block=block, budget=budget, segment_ids=ids,
                                 implementation='pallas_tpu')
    out, back = jax.vjp(rule, *arrays)
    return out, back(d_out)

  arrays = [struct((1, time, h, n)) for h, n in ((heads, width), (kv, width), (kv, value))]
  facts = (struct((1, own, time // 128, entries), jnp.int32), struct((1,), jnp.int32),
           struct((1, time), jnp.int32))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jax.jit(run).lower(arrays, struct((1, time, heads, value)), *facts)
  assert lowered.as_text().count('@tpu_custom_call') == 3
  stats = lowered.compile().memory_analysis()
  return stats.temp_size_in_bytes, stats.argument_size_in_bytes + stats.output_size_in_bytes


def compiled(cases):
  pytest.importorskip('libtpu')
  return json.loads(child.answer(__file__, json.dumps(cases)))


@pytest.mark.aot
@pytest.mark.slow
def test_kernels_compile_for_tpu():
  """No array of the size of the scores, or of T * M * block keys: only copies of the arguments."""
  sizes = TIME, 2, 1, 128, 128, 1, 256, 7, 'bfloat16'
  for temporary, arrays in compiled([['v5e:2x2', sizes], ['v6e:2x2', sizes]]):
    assert temporary <= arrays < 32 << 20


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
def test_kernels_compile_at_full_size(topology):
  found = compiled([[topology, sizes] for sizes in (
    (32768, 32, 8, 128, 128, 8, 256, 32, 'bfloat16'),
    (32768, 32, 8, 128, 128, 32, 256, 32, 'bfloat16'),  # a table per query head: several calls
    (TIME, 8, 2, 128, 128, 2, 256, 32, 'float32'), (TIME, 8, 2, 64, 64, 2, 64, 16, 'bfloat16'),
    (TIME, 16, 1, 576, 512, 1, 256, 32, 'bfloat16'))])
  for temporary, arrays in found:
    assert temporary <= 2 * arrays


if __name__ == '__main__':
  print(json.dumps([compile_for(*case) for case in json.loads(sys.argv[1])]))
