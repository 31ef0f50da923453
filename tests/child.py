"""Children of tests that compile for TPU: libtpu hangs beside the many CPU devices of a test."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*args: str, **settings: str) -> subprocess.CompletedProcess:
  """Runs python with these arguments and settings of the environment; its output is text."""
  env = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR')}
  env |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
          'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}', **settings}
  return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, check=False,
                        capture_output=True, text=True)


def answer(*args: str, **settings: str) -> str:
  """What such a process prints; it must not fail."""
  done = run(*args, **settings)
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout
