"""Decoding from slots on TPU copies no cache, keys on the device or in host memory: compiled."""

import dataclasses
import json
import sys

import child
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels import tls_attention as tls
from zppo_jax.mesh import axes, place
from zppo_jax.models import config as config_lib
from zppo_jax.models import decoder
from zppo_jax.models import params as params_lib
from zppo_jax.models.mixers import cached
from zppo_jax.sampling import decode, slots

ROWS, SIZE, POOL = 2, 65536, 320
KERNEL = tls.Config(stale=True)
HOW = {'dense': None, 'sparse': config_lib.Sparse(KERNEL),
       'pool': config_lib.Sparse(KERNEL, pool=POOL, misses=2)}


def compile_steps(name, mesh):
  """Bytes on a device and of its host, for sixteen tokens of both rows."""
  settings = decode.Settings(max_new_tokens=64, eos_ids=(2,))
  config = config_lib.ModelConfig(
    vocab=256, hidden=256, layers=2, heads=8, kv_heads=2, head_dim=128, inter=256,
    dtype='bfloat16', param_dtype='bfloat16', sparse=HOW[name])

  def put(x, kind=None, split=None):
    spec = PartitionSpec(*(['tensor' if i == split else None for i in range(x.ndim)]))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(
      mesh, spec, memory_kind=kind))

  def heads(x):  # of caches [B, KV, ..] and of host pages [B, NB + 1, KV, ..]
    kind, split = ('pinned_host', 2) if x.ndim == 5 and x.shape[1] > 2 else (None, 1)
    return put(x, kind, split if x.ndim >= 3 else None)

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    params = jax.eval_shape(lambda: decoder.split_blocks(
      config, params_lib.init(config, jax.random.key(0))))
    state = jax.eval_shape(lambda: slots.empty(
      config, jax.random.key(0), rows=ROWS, size=SIZE, prompt=SIZE - 64, settings=settings))
    cache = jax.tree.map(heads, state.cache)
    state = dataclasses.replace(jax.tree.map(put, state), cache=cache)
    memory = slots.steps.lower(config, jax.tree.map(put, params), state, most=16,
                               settings=settings).compile().memory_analysis()
  return dict(
    arguments=memory.argument_size_in_bytes, alias=memory.alias_size_in_bytes,
    temporary=memory.temp_size_in_bytes, host=memory.host_argument_size_in_bytes,
    host_alias=memory.host_alias_size_in_bytes, host_temporary=memory.host_temp_size_in_bytes)


def compile_all(topology, chips, names):
  from jax.experimental import topologies
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = Mesh(np.array(devices[:chips]).reshape(1, 1, 1, 1, chips), axes.MESH_AXES)
  return {name: compile_steps(name, mesh) for name in names}


@pytest.mark.aot
@pytest.mark.parametrize('topology, chips, names', [
  ('v5e:2x2', 1, ['sparse', 'pool']),
  *(pytest.param(t, n, list(HOW), marks=pytest.mark.slow) for t, n in (
    ('v5e:2x2', 2), ('v6e:2x2', 1), ('v5p:2x2x1', 2)))])
def test_a_step_copies_no_cache(topology, chips, names):
  """Temporaries are small beside the keys; with a pool only it is on the device."""
  pytest.importorskip('libtpu')
  found = json.loads(child.answer(__file__, topology, str(chips), *names))
  layer = 2 * ROWS * 2 * 128 * 2 // chips  # arrays, rows, heads, width, bytes: of one token
  keys = 2 * layer * SIZE
  for name, x in found.items():
    assert x['temporary'] < keys / 12, (name, x, keys)
    if name == 'pool':
      assert x['host'] == x['host_alias'] == 2 * layer * (SIZE + 64)
      assert x['host_temporary'] == 0
      assert x['arguments'] < found['sparse']['arguments'] - keys + 2 * layer * (POOL + 8) * 64
    else:
      assert x['alias'] >= keys and x['host'] == 0


@pytest.mark.parametrize('mesh', [None, dict(data=4, tensor=2)], ids=['one device', 'eight'])
def test_tokens_are_put_where_a_scatter_puts_them(mesh):
  """Also behind the last column, where there is none."""
  rng = np.random.default_rng(0)
  old, x = (jnp.asarray(rng.normal(size=(4, 2, n, 3)), jnp.float32) for n in (9, 1))
  start = jnp.asarray([0, 8, 9, 4])
  wanted = old.at[jnp.arange(4), :, start].set(x[:, :, 0], mode='drop')
  mesh = place.make_mesh(mesh or dict(data=1), jax.devices()[:8 if mesh else 1])
  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(jax.jit(cached.put_tokens)(old, x, start), wanted)


if __name__ == '__main__':
  print(json.dumps(compile_all(sys.argv[1], int(sys.argv[2]), sys.argv[3:])))
