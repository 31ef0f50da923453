"""A sequence cut over a mesh axis gives what the whole sequence gives, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels.delta_rule import api, context, shapes

SHARDS, TIME = 4, 48


@pytest.mark.parametrize('packed', (False, True))
def test_four_shards_equal_one(packed):
  case = shapes.Case(TIME, heads=2, key_heads=1, key=8, value=8, batch=2)
  arguments, _ = shapes.make(case)
  arguments = [jnp.asarray(arguments[n], jnp.float32) for n in shapes.ARGUMENTS]
  ids = np.ones((2, TIME), np.int32)
  if packed:  # borders at and off the cuts, a shard of padding, a segment through it
    ids[0, 5:], ids[0, 12:], ids[0, 30:] = 2, 3, 4
    ids[1, 10:26] = 0
  ids = jnp.asarray(ids)
  mesh = Mesh(np.asarray(jax.devices()[:SHARDS]), ('context',))
  rows = P(None, 'context')

  def sharded(*a):
    *inputs, state, ids = a
    return context.delta_rule_sharded(*inputs, axis_name='context', state=state, segment_ids=ids)

  cut = jax.shard_map(sharded, mesh=mesh, in_specs=(*[rows] * 5, P(), rows), out_specs=(rows, P()),
                      check_vma=False)

  def whole(*a):
    *inputs, state, ids = a
    return api.delta_rule(*inputs, state=state, segment_ids=ids)

  def loss(rule, *a):
    out, state = rule(*a, ids)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state)), (out, state)

  found, wanted = (
    jax.jit(jax.value_and_grad(functools.partial(loss, rule), argnums=range(6), has_aux=True))(
      *arguments) for rule in (cut, whole))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
