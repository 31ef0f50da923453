"""Times the delta rule: python -m experiments.bench_kernels [--time=4096 --heads=8 --out=DIR]

(or, with --kernel=tls_attention, sparse decoding: bench_tls.py; with --kernel=tls_decode, a model
that decodes so: bench_tls_decode.py; with --kernel=block_attention, its form for training:
bench_blocks.py)

On this machine, ours against the token scan and, with --peer_python, against the chunked rule of
transformers in torch, in turn and in one run:
  python3.11 -m venv .venv-torch
  .venv-torch/bin/pip install torch==2.13.0 transformers==5.23.0
A speed-up is printed only for a shape whose numbers have passed. With --aot nothing runs: the TPU
kernels are compiled for --topology, and their bytes, flops, memory and static schedule printed,
beside the schedule of tokamax where it is installed, here or under --peer_python
(bench_kernels_tokamax.py).
With --scaling=4096,16384,65536 the chunked form is timed at these lengths.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import bench_common as common
from kernels.delta_rule import api, inputs
from zppo_jax.core.errors import UserError
from zppo_jax.launch import flags as flags_lib

WORKER = pathlib.Path(__file__).with_name('bench_torch.py')
BOUND = 1e-4  # relative RMS error to the token scan; equal work in another order of sums
PARTS = ('forward', 'both')


@dataclasses.dataclass(frozen=True)
class Shape:
  time: int
  heads: int
  key: int = 128
  value: int = 128
  seed: int = 0


def make_arrays(s: Shape) -> dict[str, np.ndarray]:
  """GDN inputs in float32; `channel_decay` is the vector form, that only we can run."""
  rng = np.random.default_rng(s.seed)

  def draw(*size):
    return rng.normal(size=(1, s.time, s.heads, *size)).astype(np.float32)

  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  return dict(q=unit(draw(s.key)), key=unit(draw(s.key)), value=draw(s.value),
              decay=-np.exp(draw() / 2 - 2.5), channel_decay=-np.exp(draw(s.key) / 2 - 2.5),
              rate=1 / (1 + np.exp(-draw())), weight=draw(s.value))


def programs(implementation: str, vector: bool, arrays: dict[str, np.ndarray]):
  """({part: compiled call}, arguments) of a form: forward, and forward with all gradients."""
  decay = arrays['channel_decay'] if vector else arrays['decay'][..., None]
  arguments = [jnp.asarray(x) for x in (arrays['q'], arrays['key'], arrays['value'], decay,
                                        arrays['rate'])]
  weight = jnp.asarray(arrays['weight'])

  def rule(q, key, value, decay, rate):
    return api.delta_rule(q, *inputs.gdn_inputs(key, value, rate), decay,
                          implementation=implementation)

  def loss(*a):
    out, state = rule(*a)
    return jnp.sum(out * weight) + jnp.sum(state)

  compiled = dict(forward=jax.jit(rule), both=jax.jit(jax.grad(loss, argnums=range(5))))
  compiled = {k: f.lower(*arguments).compile() for k, f in compiled.items()}
  return {k: functools.partial(f, *arguments) for k, f in compiled.items()}, compiled['both']


def results(calls) -> list:
  return [*jax.tree.leaves(calls['forward']()), *calls['both']()]


def run(s: Shape, repeats: int, peer_python: str) -> dict[str, Any]:
  """Seconds of every side and part, after the checks. Raises Refused when a check fails."""
  arrays = make_arrays(s)
  sides, checks, memory = {}, [], {}
  for form in ('scalar', 'vector'):
    for name in ('chunked', 'reference'):
      sides[f'{name}_{form}'], compiled = programs(name, form == 'vector', arrays)
      stats = compiled.memory_analysis()
      held = stats.argument_size_in_bytes + stats.output_size_in_bytes
      memory[f'{name}_{form}'] = 1 + stats.temp_size_in_bytes / held
    checks.append(common.Check(f'chunked {form} against the scan', common.error(
      results(sides[f'chunked_{form}']), results(sides[f'reference_{form}'])), BOUND))
  peer = common.Peer(peer_python, 'kernels', s, arrays, WORKER) if peer_python else None
  try:
    if peer:
      theirs = np.load(peer.facts['outputs'])
      ours = [sides['chunked_scalar']['forward']()[0], *sides['chunked_scalar']['both']()]
      ours[4] = ours[4][..., 0]
      names = ('out', 'd_q', 'd_key', 'd_value', 'd_decay', 'd_rate')
      checks.append(common.Check('chunked scalar against torch',
                                 common.error(ours, [theirs[n] for n in names]), BOUND))
    common.require(checks)
    seconds = {f'{side}/{part}': [] for side in sides for part in PARTS}
    seconds |= {f'torch/{part}': [] for part in PARTS if peer}
    for turn in range(repeats):
      for key in list(seconds)[::1 if turn % 2 == 0 else -1]:
        side, part = key.split('/')
        if side.startswith('reference') and part == 'both' and turn > 1:
          continue  # the gradient of the scan is slow and steady
        took = (peer.ask(part=part)['seconds'] if side == 'torch' else
                common.seconds(sides[side][part])[0])
        seconds[key].append(took)
    facts = peer.facts if peer else {}
  finally:
    if peer:
      peer.close()
  return dict(shape=dataclasses.asdict(s), versions=dict(jax=jax.__version__), peer=facts,
              checks=[dataclasses.asdict(c) for c in checks], memory_over_arrays=memory,
              seconds=seconds)


def scaling(s: Shape, times: tuple[int, ...], repeats: int) -> dict[str, Any]:
  """Minima of the chunked form by length, in turn; time over that of a line through the first."""
  sides, memory = {}, {}
  for time in times:
    shape = dataclasses.replace(s, time=time)
    sides[time], compiled = programs('chunked', True, make_arrays(shape))
    stats = compiled.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes
    memory[time] = 1 + stats.temp_size_in_bytes / held
  best = {time: dict.fromkeys(PARTS, float('inf')) for time in times}
  for _ in range(repeats):
    for time in times:
      for part in PARTS:
        best[time][part] = min(best[time][part], common.seconds(sides[time][part])[0])
  over = {f'{a} to {b}': {part: best[b][part] / best[a][part] * a / b for part in PARTS}
          for i, a in enumerate(times) for b in times[i + 1:]}
  return dict(shape=dataclasses.asdict(s), versions=dict(jax=jax.__version__), seconds=best,
              time_over_linear=over, memory_over_arrays=memory)


def report_scaling(result: dict[str, Any], out: str) -> None:
  for span, ratio in result['time_over_linear'].items():
    print(f'  {span:16s} forward {ratio["forward"]:.2f}x linear, '
          f'with backward {ratio["both"]:.2f}x')
  print('  memory over arrays: ' + ', '.join(
    f'{k} {v:.2f}' for k, v in result['memory_over_arrays'].items()))
  if out:
    common.write_json(out, 'bench_kernels_scaling', result)


def report(result: dict[str, Any], out: str) -> None:
  """Prints medians, minima and ratios to each baseline; writes bench_kernels.json and .png."""
  best = {k: min(x) for k, x in result['seconds'].items()}
  for check in result['checks']:
    print(f'  check {check["name"]}: {check["value"]:.2g} <= {check["bound"]:.2g}')
  for key, x in result['seconds'].items():
    side, part = key.split('/')
    line = f'  {key:26s} min {min(x) * 1e3:8.1f} ms, median {np.median(x) * 1e3:8.1f}'
    if side.startswith('chunked'):
      line += f', {best[f"reference_{side[8:]}/{part}"] / min(x):.2f}x the scan'
      if f'torch/{part}' in best:
        line += f', {best[f"torch/{part}"] / min(x):.2f}x torch'
    print(line)
  for side, ratio in result['memory_over_arrays'].items():
    print(f'  {side:26s} forward and backward hold {ratio:.2f}x their arrays')
  if out:
    folder = common.write_json(out, 'bench_kernels', result)
    _plot(best, result['shape'], folder / 'bench_kernels.png')


def _plot(best: dict[str, float], shape: dict[str, Any], path: pathlib.Path) -> None:
  from matplotlib.figure import Figure  # without pyplot: no global state

  figure = Figure(figsize=(6, 3), layout='constrained')
  for axes, part, title in zip(figure.subplots(1, 2), PARTS, ('forward', 'forward and backward')):
    rows = {k.split('/')[0]: t * 1e3 for k, t in best.items() if k.endswith('/' + part)}
    bars = axes.barh(list(rows)[::-1], list(rows.values())[::-1])
    axes.bar_label(bars, fmt='%.0f', fontsize=8, padding=2)
    axes.set_xscale('log')
    axes.margins(x=0.2)
    axes.set_xlabel('ms')
    axes.set_title(title, fontsize=9)
    axes.spines[['top', 'right']].set_visible(False)
  title = 'delta rule, T {time}, H {heads}, K {key}, V {value}'.format(**shape)
  figure.suptitle(title, fontsize=10)
  figure.savefig(path, dpi=110)


def main(argv) -> None:
  del argv
  f = flags.FLAGS
  for name in ('time', 'heads', 'key', 'value', 'repeats'):
    if f[name].value < 1:
      raise UserError(f'--{name} must be at least 1, got {f[name].value}')
  if f.kernel == 'tls_attention':
    from experiments import bench_tls
    bench_tls.run([int(n) for n in f.lengths], f.dtypes, f.repeats, f.out)
    return
  if f.kernel == 'tls_decode':
    from experiments import bench_tls_decode
    bench_tls_decode.run([int(n) for n in f.lengths], f.repeats, f.out)
    return
  if f.kernel == 'block_attention':
    from experiments import bench_blocks
    lengths = f.lengths if f['lengths'].present else bench_blocks.LENGTHS
    bench_blocks.run([int(n) for n in lengths], f.dtypes, f.repeats, f.out)
    return
  shape = Shape(f.time, f.heads, f.key, f.value)
  if f.aot:
    from experiments import bench_kernels_aot, bench_kernels_tokamax
    found = bench_kernels_aot.compile_all(shape, f.topology, f.chips, f.dtype)
    found['tokamax'] = bench_kernels_tokamax.beside(found, shape, f.peer_python)
    print(json.dumps(found, indent=1))
    print(*bench_kernels_tokamax.lines(found), sep='\n', file=sys.stderr)
    return
  print(f'delta rule on {jax.default_backend()}, {shape}')
  if f.scaling:
    times = tuple(int(t) for t in f.scaling)
    report_scaling(scaling(shape, times, f.repeats), f.out)
    return
  report(run(shape, f.repeats, f.peer_python), f.out)


def define_flags() -> None:
  flags.DEFINE_enum('kernel', 'delta_rule',
                    ['delta_rule', 'tls_attention', 'tls_decode', 'block_attention'],
                    'What to time; see bench_tls, bench_tls_decode and bench_blocks.')
  flags.DEFINE_list('lengths', ['16384', '49152', '98304', '131072'], 'Contexts of the others.')
  flags.DEFINE_multi_enum('dtypes', ['float32', 'bfloat16'], ['float32', 'bfloat16'],
                          'Of the others.')
  flags.DEFINE_integer('time', 4096, 'Tokens.')
  flags.DEFINE_list('scaling', [], 'Lengths to compare with each other instead, say 4096,16384.')
  flags.DEFINE_integer('heads', 8, 'Heads.')
  flags.DEFINE_integer('key', 128, 'K.')
  flags.DEFINE_integer('value', 128, 'V.')
  flags.DEFINE_integer('repeats', 7, 'Runs of each side.')
  flags.DEFINE_string('peer_python', '',
                      'Python of a virtualenv with torch and transformers; of --aot, with tokamax.')
  flags.DEFINE_string('out', '', 'Folder for bench_kernels.json and .png.')
  flags.DEFINE_bool('aot', False, 'Compile the TPU kernels ahead of time instead.')
  flags.DEFINE_string('topology', 'v6e:2x2', 'TPU topology of --aot.')
  flags.DEFINE_integer('chips', 1, 'Chips of --aot, which share the heads.')
  flags.DEFINE_enum('dtype', 'bfloat16', ['bfloat16', 'float32'], 'Of the inputs of --aot.')


if __name__ == '__main__':
  define_flags()
  app.run(main, flags_parser=flags_lib.flags_parser)
