"""Worker of `bench_kernels --aot`: the schedule of tokamax's kimi delta attention on TPU.

  python3.12 -m venv .venv-tokamax
  .venv-tokamax/bin/pip install tokamax==0.0.17 libtpu==0.0.52
Runs in a virtualenv of its own and imports nothing of this project; `beside` and `lines` are for
the driver. The forward of tokamax leaves states, pair matrices and inverses in HBM for its
backward; ours leaves nothing, and runs the states again.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

CHUNK = 64  # tokens that a figure is given for, whatever a grid step computes


@dataclasses.dataclass(frozen=True)
class Spec:
  time: int
  heads: int  # of one chip
  key: int
  value: int
  dtype: str
  topology: str


def beside(found: dict[str, Any], shape, python: str) -> dict[str, Any]:
  """tokamax's figures for the case of `found`, of bench_kernels_aot, or {'missing': why}."""
  from experiments import bench_common
  from zppo_jax.core.errors import UserError
  if not python and importlib.util.find_spec('tokamax') is None:
    return dict(missing='not installed')
  spec = Spec(shape.time, shape.heads // found['chips'], shape.key, shape.value, found['dtype'],
              found['topology'])
  try:
    peer = bench_common.Peer(python or sys.executable, 'kernels', spec, {}, pathlib.Path(__file__))
  except UserError as error:  # ours are printed all the same
    return dict(missing=str(error))
  peer.close()
  theirs, own = peer.facts.get('bundles_per_head_and_chunk', {}), ours(found)
  return peer.facts | dict(ours_over_tokamax={k: own[k] / theirs[k] for k in own if k in theirs})


def ours(found: dict[str, Any]) -> dict[str, float]:
  """Our bundles by part; empty without a schedule dump."""
  kernels = {k.removeprefix('delta_rule_'): n
             for k, n in found['bundles_per_head_and_chunk'].items()}
  return kernels and dict(forward=kernels['forward'],
                          backward=kernels['states'] + kernels['backward'])


def lines(found: dict[str, Any]) -> Iterator[str]:
  """Ours and tokamax's side by side, or what is missing."""
  own, theirs = ours(found), found['tokamax']
  if not own:
    yield 'ours: no schedule dump'
  for part, n in own.items():
    line = f'{part:8s} ours {n:.0f} bundles per head and {CHUNK} tokens'
    if 'missing' not in theirs:
      line += (f', tokamax {theirs["bundles_per_head_and_chunk"][part]:.0f}, '
               f'ours / tokamax {theirs["ours_over_tokamax"][part]:.2f}')
    yield line
  yield f'tokamax: {theirs["missing"]}' if 'missing' in theirs else (
    'temporaries in HBM, MiB: ' + ', '.join(
      f'{side} {name} {program["temp_bytes"] / 2**20:.0f}' for side, programs in
      (('ours', found['programs']), ('tokamax', theirs['programs']))
      for name, program in programs.items()))


def bundles(folder: pathlib.Path) -> dict[str, int]:
  """Bundles of straight-line code, so of one grid step, by kernel."""
  found = {}
  for path in sorted(folder.glob('*-schedule-analysis_final_bundles.txt')):
    kernel = re.match(r'\d+-(.+?)(\.\d+)?-\d+-schedule', path.name)
    total = re.search(r'total scheduled bundles:\s*(\d+)', path.read_text())
    if kernel and total:
      found[kernel[1]] = int(total[1])
  return found


def grid_steps(jaxpr, name: str = '') -> Iterator[tuple[str, int]]:
  """(kernel, grid steps): XLA names these kernels after the jitted function around them."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'pallas_call':
      yield name, math.prod(eqn.params['grid_mapping'].grid)
      continue
    for inner in eqn.params.values():
      if hasattr(inner, 'eqns'):
        yield from grid_steps(inner, eqn.params.get('name', name))


def measure(spec: Spec, folder: pathlib.Path) -> dict[str, Any]:
  """Compiles forward and gradients; kernels that only the latter has are those of the backward."""
  import jax
  import tokamax
  from jax.experimental import topologies
  devices = topologies.get_topology_desc(platform='tpu', topology_name=spec.topology).devices[:1]
  mesh = jax.sharding.Mesh(devices, ('x',))
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def struct(*size, dtype=spec.dtype):
    return jax.ShapeDtypeStruct(size, dtype, sharding=where)

  def rule(*args):
    return tokamax.ops.kimi_delta_attention(*args, scale=1., output_final_state=True,
                                            implementation='mosaic')

  rows = spec.heads, 1, spec.time
  args = (*(struct(*rows, n) for n in (spec.key, spec.key, spec.value)),
          struct(*rows, spec.key, dtype='float32'), struct(*rows))
  grads = args[2], struct(1, 1, spec.heads, spec.key, spec.value, dtype='float32')
  calls = dict(forward=(rule, args), both=(lambda a, g: jax.vjp(rule, *a)[1](g), (args, grads)))
  kernels, figures, programs = {}, {}, {}
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), tokamax.config.cross_compile(True):
    if not tokamax.ops.tpu.KimiDeltaAttention().supported_on(devices[0]):
      return dict(missing=f'not supported on {spec.topology.partition(":")[0]}')
    for name, (fn, inputs) in calls.items():
      traced = jax.jit(fn).trace(*inputs)
      stats = traced.lower().compile().memory_analysis()
      programs[name] = dict(temp_bytes=stats.temp_size_in_bytes)
      steps = dict(grid_steps(traced.jaxpr))
      new = {k: dict(bundles=n, grid_steps=steps[k]) for k, n in bundles(folder).items()
             if k in steps and k not in kernels}
      if not new:
        return dict(missing='no schedule dump')
      total = sum(k['bundles'] * k['grid_steps'] for k in new.values())
      figures['backward' if kernels else name] = total * CHUNK / (spec.heads * spec.time)
      kernels |= new
  return dict(versions={k: importlib.metadata.version(k) for k in ('tokamax', 'jax', 'libtpu')},
              kernels=kernels, bundles_per_head_and_chunk=figures, programs=programs)


def main() -> None:
  answer = os.fdopen(os.dup(1), 'w')  # libraries that print to stdout must not reach the driver
  os.dup2(2, 1)
  first = json.loads(sys.stdin.readline())
  folder = pathlib.Path(first['folder'])
  os.environ |= dict(JAX_PLATFORMS='cpu', LIBTPU_INIT_ARGS=(
    f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true'))
  try:
    facts = measure(Spec(**first['spec']), folder)
  except ModuleNotFoundError as error:
    facts = dict(missing=f'not installed ({error})')
  except NotImplementedError as error:
    facts = dict(missing=f'not supported: {error}')
  answer.write(json.dumps(facts) + '\n')


if __name__ == '__main__':
  main()
