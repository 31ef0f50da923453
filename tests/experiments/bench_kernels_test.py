"""The kernel benchmark refuses wrong numbers; the TPU kernels compile for their chips."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments import bench_common, bench_kernels

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


@pytest.mark.aot
def test_kernels_compile_without_temporaries():
  check(compile_for('v5e:2x2', time=8192, heads=2))


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize('time', (8192, 131072))
@pytest.mark.parametrize('topology', ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'))
def test_kernels_compile_at_full_size(topology, time):
  check(compile_for(topology, time=time, heads=32,
                    chips=4 if (topology, time) == ('v5e:2x2', 131072) else 1))
