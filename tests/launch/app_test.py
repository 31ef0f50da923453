"""Command lines: the exact line a user sees, and the exit status."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from zppo_jax.core.errors import UserError
from zppo_jax.launch import flags as flags_lib

ROOT = pathlib.Path(__file__).parents[2]

GRPO = """
import ml_collections
from shared import check
def get_config(preset='tiny'):
  check(preset)
  config = ml_collections.ConfigDict()
  config.learning_rate = 0.1
  config.steps = 3
  config.betas = (0.9, 0.99)
  config.optim = dict(name='adam', weight_decay=0.1)
  return config
"""
SHARED = """
def check(preset):
  if preset not in ('tiny', 'pod'):
    raise ValueError(f'unknown preset {preset!r}: choose from tiny, pod')
"""
MAIN = """
import sys, time
start = time.perf_counter()
from zppo_jax.launch import app
seconds = time.perf_counter() - start
from zppo_jax.core.errors import ConfigError
def main(launch):
  import jax
  from jax._src import xla_bridge
  assert not xla_bridge._backends, 'a device was touched'
  assert seconds < 3, seconds
  if launch.config.steps == 13:
    raise ConfigError('steps: 13 brings bad luck')
  if launch.config.steps == 14:
    raise RuntimeError('a bug')
  print(launch.config.steps, launch.config.betas, launch.workdir, launch.resume, launch.cleanup,
        jax.config.jax_debug_nans)
  return launch.config.steps if launch.config.steps == 42 else None
if __name__ == '__main__':
  app.run(main)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('launch')
  files = {
    'grpo.py': GRPO,
    'shared.py': SHARED,
    'main.py': MAIN,
    'broken.py': 'def get_config():\n  x = 1\n  return x / 0\n',
    'syntax.py': 'def get_config(:\n',
    'lines.py': 'def get_config():\n  raise ValueError("two\\nlines")\n',
    'none.py': 'def get_config():\n  pass\n',
    'absent.py': 'import no_such_module_here\n',
  }
  for name, text in files.items():
    (path / name).write_text(text)
  return path


BAD = [  # arguments, the whole line
  ('--config=grpo.py --config.lerning_rate=1',
   "'lerning_rate': did you mean 'learning_rate'? (grpo.py)"),
  ('--config=grpo.py:tiny --config.optim.weight_deca=1',
   "'optim.weight_deca': did you mean 'optim.weight_decay'? (grpo.py)"),
  ('--config=grpo.py --config.weight_decay=1',
   "'weight_decay': did you mean 'optim.weight_decay'? (grpo.py)"),
  ('--config=grpo.py --config.zzz=1',
   "'zzz': no such field; known: betas, learning_rate, optim, steps (grpo.py)"),
  ('--config grpo.py --noconfig.step',
   "'step': did you mean 'steps'? (grpo.py)"),
  ('--config=grpo.py --config.steps.x=1',
   "'steps.x': did you mean 'steps'? (grpo.py)"),
  ('--config=grpo.py:tinny',
   "unknown preset 'tinny': choose from tiny, pod (shared.py, line 4)"),
  ('--config=grop.py', "no config file 'grop.py': did you mean 'grpo.py'?"),
  ('--config=nowhere/grpo.py', "no config file 'nowhere/grpo.py'"),
  ('--config=broken.py', 'ZeroDivisionError: division by zero (broken.py, line 3)'),
  ('--config=syntax.py', 'SyntaxError: invalid syntax (syntax.py, line 1)'),
  ('--config=lines.py', 'two lines (lines.py, line 2)'),
  ('--config=none.py', 'get_config must return a ConfigDict, got NoneType (none.py)'),
  ('--config=absent.py',
   "ModuleNotFoundError: No module named 'no_such_module_here' (absent.py, line 1)"),
  ('--config=grpo.py --config.steps=abc',
   "flag --config.steps=abc: invalid literal for int() with base 10: 'abc'"),
  ('--config.steps=3 --config=grpo.py',
   'Found --config.steps=3 in argv before a value for --config was specified'),
  ('--config=grpo.py --workdr=w', "Unknown command line flag 'workdr'. Did you mean: workdir ?"),
  ('--config=grpo.py --resume=alway',
   'flag --resume=alway: value should be one of <auto|must|never>'),
]  # fmt: skip


@pytest.mark.parametrize('arguments, line', BAD)
def test_one_line_for_every_mistake(folder, monkeypatch, arguments, line):
  monkeypatch.chdir(folder)
  monkeypatch.syspath_prepend(str(folder))
  argv = ['main.py', '--workdir=w', *arguments.split()]
  monkeypatch.setattr(sys, 'argv', argv)  # the config flag reads its overrides from there
  values = flags.FlagValues()
  flags_lib.define(values)
  with pytest.raises(UserError) as error:
    flags_lib.parse(argv, values)
  assert str(error.value) == line


@pytest.mark.parametrize('missing', ['workdir', 'config'])
def test_required_flags(folder, monkeypatch, missing):
  monkeypatch.chdir(folder)
  monkeypatch.syspath_prepend(str(folder))
  given = {'workdir': '--workdir=w', 'config': '--config=grpo.py'}
  argv = ['main.py', *(flag for name, flag in given.items() if name != missing)]
  monkeypatch.setattr(sys, 'argv', argv)
  values = flags.FlagValues()
  flags_lib.define(values)
  with pytest.raises(UserError, match=f'^--{missing} is required$'):
    flags_lib.parse(argv, values)


def launch(folder, *arguments):
  env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, 'main.py', *arguments]
  return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def test_good_command_line(folder):
  done = launch(
    folder, '--config=grpo.py:tiny', '--workdir=w', '--config.steps=5',
    '--config.betas=(0.1,0.2)', '--resume=must', '--jax_debug_nans',
  )  # fmt: skip
  assert (done.returncode, done.stdout) == (0, '5 (0.1, 0.2) w must False True\n'), done.stderr


STATUSES = [
  (['--config=grpo.py', '--workdir=w', '--config.stps=1'], 2,
   "config error: 'stps': did you mean 'steps'? (grpo.py)\n"),
  (['--config=grpo.py'], 2, 'flag error: --workdir is required\n'),
  (['--config=grpo.py', '--workdir=w', '--config.steps=13'], 2,
   'error: steps: 13 brings bad luck\n'),
  (['--config=grpo.py', '--workdir=w', 'extra'], 2,
   "error: unexpected argument 'extra': flags start with --\n"),
  (['--config=grpo.py', '--workdir=w', '--config.steps=42'], 42, ''),
]  # fmt: skip


@pytest.mark.parametrize('arguments, status, stderr', STATUSES)
def test_exit_statuses(folder, arguments, status, stderr):
  done = launch(folder, *arguments)
  assert (done.returncode, done.stderr) == (status, stderr)


def test_a_bug_keeps_its_traceback(folder):
  done = launch(folder, '--config=grpo.py', '--workdir=w', '--config.steps=14')
  assert done.returncode == 1 and 'RuntimeError: a bug' in done.stderr
