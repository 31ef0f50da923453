"""Launch scripts run against programs that only write down what they are asked."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess

import pytest

from experiments.launch import recipes

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'experiments/launch/run_tpu.sh'
ARGS = ('--config=a.py:pod', '--workdir=/mnt/runs/zppo', '--config.optim.betas=(0.9, 0.95)')


def stub(folder, name, body):
  path = folder / name
  path.write_text(f'#!/usr/bin/env bash\n{body}\n')
  path.chmod(0o755)
  return path


def environment(folder, **extra):
  return dict(os.environ, PATH=f'{folder}:{os.environ["PATH"]}', **extra)


@pytest.mark.parametrize('status, restarts, requeued', [
  (0, 0, False), (1, 0, False), (42, 0, True), (42, 49, True), (42, 50, False)])
def test_slurm_job_asks_to_be_started_again(tmp_path, status, restarts, requeued):
  stub(tmp_path, 'srun', f'printf "%s\\n" "$@"; exit {status}')
  stub(tmp_path, 'scontrol', 'echo scontrol "$@"')
  out = subprocess.run(
    ['bash'], input=recipes.slurm('zppo', ARGS, nodes=2), text=True, capture_output=True,
    env=environment(tmp_path, SLURM_JOB_ID='77', SLURM_RESTART_COUNT=str(restarts)))
  assert out.returncode == status
  assert ('scontrol requeue 77' in out.stdout) == requeued
  assert tuple(out.stdout.splitlines()[6:9]) == ARGS


def test_signal_to_a_pod_reaches_python(tmp_path):
  """xpk runs the command as `(COMMAND) &` and sends SIGTERM to that process."""
  stub(tmp_path, 'python', 'trap "exit 42" TERM; echo ready; while true; do sleep 0.05; done')
  text = recipes.gke('zppo', ARGS, cluster='pods', accelerator='h200-141gb-8', image='i')
  command = shlex.split(text, comments=True)[-1].removeprefix('--command=')
  shell = (f'trap \'kill -TERM "$!"\' TERM; ({command}) & PID=$!; '
           'while kill -0 $PID 2> /dev/null; do sleep 0.1; done; wait $PID; exit $?')
  process = subprocess.Popen(['bash', '-c', shell], env=environment(tmp_path), text=True,
                             stdout=subprocess.PIPE)
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=20) == 42
  process.stdout.close()


PYTHON = r"""
case "$1 $2" in
  '-c '*) exit 0 ;;
  '-m venv') mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
  '-m pip') [ -z "${NO_NETWORK:-}" ] || exit 1 ;;
  *) printf '%s\n' "$@"; exit 42 ;;
esac
echo "$*" >> "$LOG"
"""


@pytest.fixture
def checkout(tmp_path):
  """A folder with run_tpu.sh and a Python that only writes down what it is asked."""
  place = tmp_path / 'checkout' / 'experiments' / 'launch'
  place.mkdir(parents=True)
  shutil.copy(SCRIPT, place)
  (tmp_path / 'checkout' / 'setup.py').touch()
  stub(tmp_path, 'python', PYTHON)
  return tmp_path


def run_tpu(folder, *args, **extra):
  log = folder / 'log'
  log.write_text('')
  out = subprocess.run(
    ['bash', folder / 'checkout/experiments/launch/run_tpu.sh', *args], text=True,
    capture_output=True, cwd='/', env=environment(folder, LOG=str(log), PYTHON=str(
      folder / 'python'), ZPPO_VENV=str(folder / 'venv')) | extra)
  return out, log.read_text().splitlines()


def test_tpu_host_installs_once_and_runs(checkout):
  for steps in (3, 0):
    out, log = run_tpu(checkout, 'experiments.train', '--config.a=b c')
    assert (out.returncode, out.stdout) == (42, '-m\nexperiments.train\n--config.a=b c\n')
    assert len(log) == steps
    assert not steps or log[-1] == '-m pip install --quiet .[tpu]'
  mark = (checkout / 'venv' / '.installed').stat().st_mtime
  os.utime(checkout / 'checkout' / 'setup.py', (mark + 9, mark + 9))
  assert [line[:6] for line in run_tpu(checkout, 'experiments.train')[1]] == ['-m pip'] * 2


def test_tpu_host_repeats_an_installation_that_failed(checkout):
  out, log = run_tpu(checkout, 'experiments.train', NO_NETWORK='1')
  assert (out.returncode, len(log)) == (1, 1)
  out, log = run_tpu(checkout, 'experiments.train')
  assert (out.returncode, len(log)) == (42, 3)


def test_tpu_host_names_what_is_wrong(checkout):
  subprocess.run(['bash', '-n', SCRIPT], check=True, capture_output=True)
  out, _ = run_tpu(checkout)
  assert (out.returncode, out.stderr) == (2, 'error: usage: run_tpu.sh MODULE [FLAGS...]\n')
  out, _ = run_tpu(checkout, 'experiments.train', PYTHON='/nowhere/python')
  assert out.returncode == 2 and out.stderr.startswith('error: none of /nowhere/python is Python')
