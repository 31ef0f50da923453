"""A pool of blocks in front of host memory gives what the whole cache gives, or counts the rest."""

import dataclasses
import json
import sys

import child
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tls_decode_test import inputs

from kernels import tls_attention as tls
from kernels.tls_attention import pool as pool_lib

COSTLY = {'test_with_copies_enough_a_pool_is_the_whole_cache': ('ahead',)}
STALE = tls.Config(block=8, top_blocks=6, top_tokens=24, stale=True)
FRESH = dataclasses.replace(STALE, stale=False)
ROOM, START = 256, (150, 83)


class Trace:
  """Tokens after a prompt, the same for the whole cache and for any pool."""

  def __init__(self, config, latent=False):
    width = 24 if latent else 16
    q, key, value, length, channels = inputs(
      0, heads=4, kv=1 if latent else 2, room=ROOM, width=width, length=START)
    real = (np.arange(ROOM)[None] < np.asarray(length)[:, None])[:, None, :, None]
    self.key, self.value = (jnp.where(real, x, 0) for x in (key, value))
    self.config, self.length, self.channels = config, length, channels
    self.latent = 16 if latent else None
    state = tls.summarise(self.key, length, channels, config)
    self.state = tls.choose(q, state, length=length, config=config)
    self.query = q

  def tokens(self, count):
    """(q, key, value) of each step; queries drift."""
    rng, q = np.random.default_rng(1), np.asarray(self.query)
    for _ in range(count):
      q = 0.8 * q + 0.6 * rng.normal(size=q.shape)
      key, value = (rng.normal(size=(2, *x.shape[1::2])) for x in (self.key, self.value))
      yield tuple(jnp.asarray(x, jnp.float32) for x in (q, key, value))

  def resident(self, count):
    """Outputs with the whole cache on the device."""
    @jax.jit
    def step(held, state, length, q, *new):
      held = tuple(jax.vmap(lambda x, n, at: x.at[:, at].set(n))(x, n, length)
                   for x, n in zip(held, new))
      state = tls.append(state, new[0], length, self.channels, self.config)
      out, state = tls.decode(q, held[0], self.latent or held[1], state, channels=self.channels,
                              length=length + 1, config=self.config)
      return out, held, state

    held, state, length, outs = (self.key, self.value), self.state, self.length, []
    for q, *new in self.tokens(count):
      out, held, state = step(held, state, length, q, *new)
      outs.append(np.asarray(out))
      length = length + 1
    return outs, held

  def pooled(self, count, *, slots, misses, prefetch=True):
    """(outputs, traffic, last pool) through a pool."""
    fixed = dict(config=self.config, misses=misses, prefetch=prefetch, channels=self.channels)

    @jax.jit
    def step(pool, state, length, q, key, value):
      return pool_lib.decode(pool, state, q, key, self.latent or value, length=length, **fixed)

    pool = pool_lib.create(self.key, None if self.latent else self.value, self.state, slots=slots,
                           config=self.config)
    state, length, outs, traffic = self.state, self.length, [], []
    for q, key, value in self.tokens(count):
      out, pool, state, seen = step(pool, state, length, q, key, value)
      outs.append(np.asarray(out))
      traffic.append(jax.tree.map(np.asarray, seen))
      assert_books(pool)
      length = length + 1
    return outs, traffic, pool


def assert_books(pool):
  """The two tables are inverse to each other, and a slot holds what the host has of its block."""
  block_of, slot_of = np.asarray(pool.block_of), np.asarray(pool.slot_of)
  for row in np.ndindex(block_of.shape[:2]):
    held = {int(b): s for s, b in enumerate(block_of[row]) if b != pool_lib.FREE}
    assert held == {b: int(s) for b, s in enumerate(slot_of[row]) if s != pool_lib.FREE}
    for host, slots in zip(pool.host, pool.slots):
      np.testing.assert_array_equal(np.asarray(slots[row])[list(held.values())],
                                    np.asarray(host[row[0]])[list(held), row[1]])


@pytest.mark.parametrize('config, prefetch', [(STALE, True), (STALE, False), (FRESH, True)],
                         ids=['ahead', 'on demand', 'fresh'])
def test_with_copies_enough_a_pool_is_the_whole_cache(config, prefetch):
  trace = Trace(config)
  wanted, held = trace.resident(40)
  found, traffic, pool = trace.pooled(40, slots=12, misses=6, prefetch=prefetch)
  for a, b in zip(found, wanted):
    np.testing.assert_array_equal(a, b)
  assert sum(t.missing.sum() for t in traffic) > 40 and not any(t.absent.any() for t in traffic)
  for host, whole in zip(pool.host, held):  # what is evicted is not lost
    for b, length in enumerate(START):  # behind it lies what a slot held before
      pages = np.swapaxes(np.asarray(host[b])[:-1], 0, 1).reshape(whole[b].shape)
      np.testing.assert_array_equal(pages[:, :length + 40], whole[b][:, :length + 40])
  assert pool.host[0].sharding.memory_kind == 'pinned_host'
  assert pool.slots[0].shape == (2, 2, 13, 8, 16), 'memory on the device is that of the slots'


def test_latent_keys_need_no_values():
  trace = Trace(STALE, latent=True)
  wanted, _ = trace.resident(12)
  found, _, pool = trace.pooled(12, slots=12, misses=6)
  np.testing.assert_array_equal(found, wanted)
  assert len(pool.host) == 1


def test_too_few_copies_are_counted_and_their_blocks_wait():
  """A block that has not come is no candidate; what is read is right."""
  trace = Trace(STALE)
  wanted, _ = trace.resident(30)
  found, traffic, _ = trace.pooled(30, slots=8, misses=1)
  absent = [t.absent.sum() for t in traffic]
  assert max(absent) > 0 and min(absent) == 0
  for a, b, t in zip(found, wanted, traffic):
    assert (t.waiting <= t.missing).all() and (t.missing <= t.wanted).all()
    assert t.absent.any() or np.abs(a - b).max() == 0
  late = [np.abs(a - b).max() for a, b, t in zip(found, wanted, traffic) if t.absent.any()]
  assert max(late) > 1e-3


def test_a_pool_is_large_enough_for_a_step():
  trace = Trace(STALE)
  with pytest.raises(ValueError, match=r'slots must be at least top_blocks \+ 1 = 7, .* got 6'):
    pool_lib.create(trace.key, trace.value, trace.state, slots=6, config=STALE)
  with pytest.raises(ValueError, match=r'misses must lie in 1..top_blocks = 6, got 7'):
    trace.pooled(1, slots=12, misses=7)


def on_chip(tree, mesh, kind=None):
  sharding = NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compile_step(topology, rows):
  """Facts of a step over 98 304 tokens and the product behind it, compiled for one chip."""
  from jax.experimental import topologies
  device = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[0]
  mesh, config = Mesh(np.array([device]), ('x',)), tls.Config(stale=True)
  struct = lambda *shape, dtype=jnp.bfloat16: on_chip(jax.ShapeDtypeStruct(shape, dtype), mesh)

  def start():
    keys = jnp.zeros((rows, 2, 98304, 128), jnp.bfloat16)
    state = tls.empty(rows, 2, 98304, 128, 32, config, keys.dtype)
    return pool_lib.create(keys, keys, state, slots=320, config=config), state

  def step(pool, state, q, key, channels, length, product):
    out, *rest = pool_lib.decode(pool, state, q, key, key, channels=channels, length=length,
                                 config=config, misses=4)
    return out.reshape(rows, -1) @ product, *rest

  def place(pool):
    return dataclasses.replace(on_chip(pool, mesh), host=on_chip(pool.host, mesh, 'pinned_host'))

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    pool, state = jax.eval_shape(start)
    args = (place(pool), on_chip(state, mesh), struct(rows, 8, 128), struct(rows, 2, 128),
            struct(2, 32, dtype=jnp.int32), struct(rows, dtype=jnp.int32), struct(1024, 4096))
    out = jax.eval_shape(step, *args)
    outs = jax.tree.map(lambda x: x.sharding, (on_chip(out[0], mesh), place(out[1]),
                                               *on_chip(out[2:], mesh)))
    lowered = jax.jit(step, donate_argnums=(0, 1), out_shardings=outs).lower(*args)
  program = lowered.compile()
  memory = program.memory_analysis()
  lines = [line for line in program.as_text().splitlines() if ' = ' in line]
  at = lambda part: [i for i, line in enumerate(lines) if part in line]
  return dict(
    host=[memory.host_argument_size_in_bytes, memory.host_alias_size_in_bytes,
          memory.host_temp_size_in_bytes], temporary=memory.temp_size_in_bytes,
    starts=at(' dynamic-slice-start('), ends=at(' dynamic-slice-done('),
    kernels=at('tpu_custom_call'),
    copies=[line for line in lines if f'bf16[{rows},2,321,64,128]' in line and ' copy' in line])


@pytest.mark.aot
# Of several rows, the others gather on their sparse cores: programs that jax 0.10 cannot print.
@pytest.mark.slow
@pytest.mark.parametrize('topology, rows', [
  ('v5e:2x2', 2), ('v5p:2x2x1', 1), ('v6e:2x2', 1), ('tpu7x:2x2x1', 1)])
def test_copies_run_beside_the_attention(topology, rows):
  """Every copy starts before the attention and ends behind it; slots and host are not copied."""
  pytest.importorskip('libtpu')
  found = json.loads(child.answer(__file__, topology, str(rows)))
  cache = 2 * rows * (98304 + 64) * 2 * 128 * 2  # arrays, rows, tokens, heads, bytes of a key
  assert found['host'] == [cache, cache, 0] and found['temporary'] < 32 * 2**20
  copies = 2 * rows * 2 * 4  # arrays, rows, heads, misses
  assert len(found['starts']) == len(found['ends']) == copies
  assert max(found['starts']) < max(found['kernels']) < min(found['ends'])
  assert not found['copies']


if __name__ == '__main__':
  print(json.dumps(compile_step(sys.argv[1], int(sys.argv[2]))))
