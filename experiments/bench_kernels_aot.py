"""The TPU kernels compiled for a topology, on any host: does it fit, and how long is the schedule.

Nothing runs and nothing is allocated. Needs `libtpu` (extra `aot`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import pathlib
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.delta_rule import api, pallas_tpu
from zppo_jax.core.errors import UserError
from zppo_jax.launch import aot

ROWS = P(None, None, 'x')  # arrays are flat, [B, T, H * K]: the chips share the heads


def compile_all(shape, topology: str, chips: int, dtype: str) -> dict[str, Any]:
  """Per program (forward, backward): bytes of the compiler, our roofline, bundles per head and
  chunk.

  The backward recomputes the states that enter the chunks: they are its only temporaries.
  """
  if shape.heads % chips:
    raise UserError(f'--chips must divide --heads = {shape.heads}, got {chips}')
  with tempfile.TemporaryDirectory(prefix='zppo_schedule_') as folder:
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    os.environ['LIBTPU_INIT_ARGS'] = (os.environ.get('LIBTPU_INIT_ARGS', '') + (
      f' --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true'))
    devices, _ = aot.topology_devices(topology)
    if len(devices) < chips:
      raise UserError(f'--chips: {topology} has {len(devices)}, got {chips}')
    mesh = Mesh(devices[:chips], ('x',))
    programs = {name: _memory(compiled) for name, compiled in _compile(shape, mesh, dtype)}
    bundles = _bundles(pathlib.Path(folder))
  plan = _plan(shape, chips, dtype)
  for name, program in programs.items():
    cost = pallas_tpu.cost(plan, 1, shape.time, dtype, backward=name == 'backward')
    program |= dict(roofline_bytes=cost.bytes_accessed, roofline_flops=cost.flops)
  states = 4 * shape.heads // chips * shape.key * shape.value * -(-shape.time // plan.chunk)
  return dict(topology=topology, chips=chips, dtype=dtype, time=shape.time, heads=shape.heads,
              versions={k: importlib.metadata.version(k) for k in ('jax', 'libtpu')},
              programs=programs, state_bytes=states,
              bundles_per_head_and_chunk={k: n / plan.block for k, n in bundles.items()})


def _plan(shape, chips: int, dtype: str):
  heads = shape.heads // chips
  return pallas_tpu.make_plan(1., heads, (heads,) * 3, shape.key, shape.value,
                              jnp.dtype(dtype), False)


def _compile(shape, mesh: Mesh, dtype: str):
  """(name, compiled program) of the forward and of the backward alone."""
  def rule(*flat):
    heads = flat[0].shape[2] // shape.key
    inputs = [x.reshape(*x.shape[:2], heads, -1) for x in flat]
    out, state = api.delta_rule(*inputs, implementation='pallas_tpu')
    return out.reshape(*out.shape[:2], -1), state

  def backward(flat, grads):
    return jax.vjp(rule, *flat)[1](grads)

  def struct(size, kind=dtype):
    return jax.ShapeDtypeStruct((1, shape.time, shape.heads * size), kind,
                                sharding=NamedSharding(mesh, ROWS))

  flat = (*(struct(shape.key) for _ in range(3)), struct(shape.value), struct(shape.key, 'float32'))
  state = jax.ShapeDtypeStruct((1, shape.heads, shape.key, shape.value), 'float32',
                               sharding=NamedSharding(mesh, P(None, 'x')))
  outs = ROWS, P(None, 'x')
  share = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    forward = share(rule, in_specs=(ROWS,) * 5, out_specs=outs)
    yield 'forward', jax.jit(forward).lower(*flat).compile()
    both = share(backward, in_specs=((ROWS,) * 5, outs), out_specs=(ROWS,) * 5)
    yield 'backward', jax.jit(both).lower(flat, (struct(shape.value), state)).compile()


def _memory(compiled) -> dict[str, int]:
  stats = compiled.memory_analysis()
  return dict(argument_bytes=stats.argument_size_in_bytes, temp_bytes=stats.temp_size_in_bytes,
              output_bytes=stats.output_size_in_bytes)


def _bundles(folder: pathlib.Path) -> dict[str, int]:
  """Bundles of straight-line code per kernel, where libtpu has dumped its schedule."""
  found = {}
  for path in sorted(folder.glob('*delta_rule*schedule-analysis_final_bundles.txt')):
    total = re.search(r'total scheduled bundles:\s*(\d+)', path.read_text())
    kernel = re.search(r'delta_rule_[a-z]+', path.name)
    if total and kernel:
      found[kernel[0].rstrip('_')] = int(total[1])
  return found

