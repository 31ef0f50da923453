"""A decode step compiled ahead of time for a TPU topology, on any host; needs libtpu, no TPU.

What the compiler says of memory and of bytes stands beside the formulas of `shapes`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.tls_attention import api, cache, shapes
from kernels.tls_attention.config import Array, Config, Labels, State, Summary

TOPOLOGIES = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1')
FORMS = ('pages', 'rows', 'latent')  # pages of keys and of values, rows of both, pages of latents


def grid(topology_names, forms, lengths, rows) -> Iterator[dict[str, Any]]:
  """`measure` of every combination."""
  for topology in topology_names:
    for form in forms:
      for length in lengths:
        for n in rows:
          yield measure(topology, form, length, n)


def case_of(form: str, length: int, rows: int) -> tuple[shapes.Case, Config]:
  """The published operator: 32 query heads over 8, or 20 over a latent of 576 channels; single rows
  are fetched at half the tokens."""
  if form == 'latent':
    return shapes.Case(length, rows, heads=20, key_heads=1, width=576, value=512, labels=128,
                       latent=True), Config()
  return shapes.Case(length, rows), Config(top_tokens=512 if form == 'rows' else 1024)


def measure(topology: str, form: str, length: int, rows: int) -> dict[str, Any]:
  """Appends a token and decodes: figures of the compiled program, all per chip.

  One row is decoded by one chip; more by all chips, which share the key heads as tensor parallelism
  does, or the rows where all heads have one key head. The state is donated.
  """
  case, config = case_of(form, length, rows)
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  devices = devices if rows > 1 else devices[:1]
  mesh, chips = Mesh(np.array(devices), ('x',)), len(devices)
  axis = P('x') if case.latent else P(None, 'x')
  held, arrays = _arguments(case, config, form)
  specs = jax.tree.map(lambda _: axis, (held, arrays))
  specs[1]['length'] = P('x') if case.latent else P()
  specs[1]['channels'] = P() if case.latent else P('x')

  def step(state, arrays):
    value = case.value if case.latent else arrays.get('value')
    state = cache.append(state, arrays['new'], arrays['length'] - 1, arrays['channels'], config)
    return api.decode(arrays['q'], arrays['key'], value, state, channels=arrays['channels'],
                      length=arrays['length'], config=config, implementation='pallas_tpu')

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    placed = jax.tree.map(lambda x, spec: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), (held, arrays), specs)
    # pallas_call does not say how its results vary over the mesh.
    run = jax.shard_map(step, mesh=mesh, in_specs=specs, check_vma=False,
                        out_specs=(axis, jax.tree.map(lambda _: axis, held)))
    lowered = jax.jit(run, donate_argnums=0).lower(*placed)
    begin = time.perf_counter()
    compiled = lowered.compile()
  seconds, memory = time.perf_counter() - begin, compiled.memory_analysis()
  cached = sum(arrays[n].size * arrays[n].dtype.itemsize for n in ('key', 'value') if n in arrays)
  return dict(
    topology=topology, form=form, length=length, rows=rows, chips=chips, seconds=seconds,
    temp_bytes=memory.temp_size_in_bytes, alias_bytes=memory.alias_size_in_bytes,
    accessed_bytes=compiled.cost_analysis().get('bytes accessed', 0.),
    cache_bytes=cached // chips, full_bytes=shapes.full_bytes(case) // chips,
    sparse_bytes=shapes.sparse_bytes(case, config) // chips,
    fetched_bytes=shapes.fetched_bytes(case, config, form == 'rows') // chips,
    state_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(
      (held.summary, held.labels))) // chips)


def line(found: dict[str, Any]) -> str:
  """A row of a table, in MB per chip."""
  mb = {k.removesuffix('_bytes'): x / 1e6 for k, x in found.items() if k.endswith('_bytes')}
  return (f'{found["topology"]:11s} {found["form"]:6s} {found["length"]:6d} tokens x '
          f'{found["rows"]:2d} on {found["chips"]} chips: full reads {mb["full"]:7.1f} MB, sparse '
          f'needs {mb["sparse"]:6.1f}, fetches {mb["fetched"]:6.1f}, accesses '
          f'{mb["accessed"]:6.1f}; temporaries {mb["temp"]:5.2f}, compiled in '
          f'{found["seconds"]:4.1f} s')


def _arguments(case: shapes.Case, config: Config, form: str) -> tuple[State, dict[str, Array]]:
  """Abstract state and arrays of a step."""
  make = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  rows, heads, room, kind = case.rows, case.key_heads, case.length, jnp.dtype(case.dtype)
  tokens = make(jnp.float32, rows, heads, room)
  held = State(Summary(make(kind, rows, heads, room // config.block, 2 * case.width)),
               Labels(make(jnp.uint8, rows, heads, case.labels // 2, room), tokens, tokens),
               make(jnp.int32, rows, heads, config.top_blocks))
  key = make(kind, rows, heads, room, *[2] * (form == 'rows'), case.width)
  arrays = dict(q=make(kind, rows, case.heads, case.width), key=key,
                new=make(kind, rows, heads, case.width), length=make(jnp.int32, rows),
                channels=make(jnp.int32, heads, case.labels))
  if form == 'pages':
    arrays['value'] = make(kind, rows, heads, room, case.value)
  return held, arrays
