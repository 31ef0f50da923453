"""The kernel benchmark refuses wrong numbers; the TPU kernels compile for their chips."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl

from experiments import bench_common, bench_kernels, bench_kernels_tokamax

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = bench_kernels.Shape(time=40, heads=1, key=8, value=8)


def test_reports_ratios_to_the_scan(tmp_path, capsys):
  result = bench_kernels.run(SMALL, repeats=2, peer_python='')
  bench_kernels.report(result, str(tmp_path))
  assert 'x the scan' in capsys.readouterr().out
  written = json.loads((tmp_path / 'bench_kernels.json').read_text())
  assert written['shape']['time'] == 40 and len(written['seconds']['chunked_vector/both']) == 2
  assert (tmp_path / 'bench_kernels.png').stat().st_size > 1000


def test_scaling_compares_lengths(tmp_path, capsys):
  result = bench_kernels.scaling(SMALL, (64, 128), repeats=1)
  bench_kernels.report_scaling(result, str(tmp_path))
  assert '64 to 128' in capsys.readouterr().out
  written = json.loads((tmp_path / 'bench_kernels_scaling.json').read_text())
  assert written['time_over_linear']['64 to 128']['both'] == pytest.approx(
    written['seconds']['128']['both'] / written['seconds']['64']['both'] / 2)


def test_wrong_numbers_are_refused(monkeypatch):
  drift = iter(range(9))
  monkeypatch.setattr(bench_kernels, 'results', lambda calls: [np.full(3, 1. + next(drift))])
  with pytest.raises(bench_common.Refused, match='chunked scalar against the scan'):
    bench_kernels.run(SMALL, repeats=1, peer_python='')


OURS = dict(chips=1, dtype='bfloat16', topology='v6e:2x2', bundles_per_head_and_chunk=dict(
  delta_rule_forward=700., delta_rule_states=600., delta_rule_backward=1200.),
  programs=dict(forward=dict(temp_bytes=0)))


def lines_beside(monkeypatch, facts, python='other_python'):
  """What is printed where tokamax's worker answers with these facts."""
  def peer(python, kind, spec, arrays, worker):
    assert (python, spec.heads, spec.topology) == ('other_python', 1, 'v6e:2x2')
    return types.SimpleNamespace(facts=facts, close=lambda: None)

  monkeypatch.setattr(bench_common, 'Peer', peer)
  found = OURS | dict(tokamax=bench_kernels_tokamax.beside(OURS, SMALL, python))
  return list(bench_kernels_tokamax.lines(json.loads(json.dumps(found))))


def test_without_tokamax_reports_ours_and_says_so(monkeypatch):
  monkeypatch.setattr(bench_kernels_tokamax.importlib.util, 'find_spec', lambda name: None)
  own = ['forward  ours 700 bundles per head and 64 tokens',
         'backward ours 1800 bundles per head and 64 tokens']
  assert lines_beside(monkeypatch, {}, python='') == [*own, 'tokamax: not installed']
  assert lines_beside(monkeypatch, dict(missing='not supported on v5e')) == [
    *own, 'tokamax: not supported on v5e']


def test_ours_beside_the_figures_of_tokamax(monkeypatch):
  assert lines_beside(monkeypatch, dict(
    bundles_per_head_and_chunk=dict(forward=350., backward=900.),
    programs=dict(both=dict(temp_bytes=3 << 20)))) == [
      'forward  ours 700 bundles per head and 64 tokens, tokamax 350, ours / tokamax 2.00',
      'backward ours 1800 bundles per head and 64 tokens, tokamax 900, ours / tokamax 2.00',
      'temporaries in HBM, MiB: ours forward 0, tokamax both 3']


def test_reads_bundles_from_a_schedule_dump(tmp_path):
  name = '179530-pallas_kda_fwd_intra_fused.1-71-{}final_bundles.txt'
  (tmp_path / name.format('schedule-analysis_')).write_text(
    'Schedule analysis:\n\ttotal scheduled bundles:    4791\n\tempty scheduled bundles:    12\n'
    '\tnon empty scheduled bundles: 4779\n')
  (tmp_path / name.format('')).write_text('// Bundles\n')
  assert bench_kernels_tokamax.bundles(tmp_path) == {'pallas_kda_fwd_intra_fused': 4791}


def test_grid_steps_by_the_function_around_a_kernel():
  @jax.jit
  def kernel(x):
    return pl.pallas_call(lambda a, b: None, grid=(3, 2), out_shape=x)(x)

  traced = jax.jit(lambda x: kernel(kernel(x))).trace(jax.numpy.zeros((8, 128)))
  assert dict(bench_kernels_tokamax.grid_steps(traced.jaxpr)) == {'kernel': 6}


def compile_for(topology, *, time, heads, chips=1):
  pytest.importorskip('libtpu')
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | {'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.bench_kernels', '--aot', f'--topology={topology}',
     f'--time={time}', f'--heads={heads}', f'--chips={chips}'],
    cwd=ROOT, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout)


def check(found):
  programs, slack = found['programs'], 8 << 20  # the zero state and the addresses of results
  assert programs['forward']['temp_bytes'] <= slack
  assert programs['backward']['temp_bytes'] <= found['state_bytes'] + slack
  assert programs['forward']['roofline_bytes'] > 0
  assert found['bundles_per_head_and_chunk'] and found['tokamax']


@pytest.mark.aot
@pytest.mark.slow
def test_kernels_compile_without_temporaries():
  check(compile_for('v5e:2x2', time=8192, heads=2))


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize('time', (8192, 131072))
@pytest.mark.parametrize('topology', ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'))
def test_kernels_compile_at_full_size(topology, time):
  check(compile_for(topology, time=time, heads=32,
                    chips=4 if (topology, time) == ('v5e:2x2', 131072) else 1))
