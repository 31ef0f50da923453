"""The run's folder: new, continued, refused, deleted."""

import json
import os
import shlex
import sys

import pytest

from zppo_jax.core.errors import ConfigError
from zppo_jax.launch import workdir

CONFIG = {'lr': 0.1, 'log': {'every': 1}}


def checkpoint(path, *steps):
  for step in steps:
    os.makedirs(path / 'checkpoints' / str(step))


def test_new_run_writes_its_facts(tmp_path):
  path = tmp_path / 'a' / 'run'
  prepared = workdir.prepare(str(path), CONFIG)
  assert prepared == workdir.Workdir(str(path), None, False)
  assert json.loads((path / 'config.json').read_text()) == CONFIG
  assert (path / 'command.txt').read_text() == shlex.join(sys.orig_argv) + '\n'
  assert os.path.isdir(prepared.checkpoints)
  commit = workdir.git_commit()
  assert (path / 'git.txt').exists() == (commit is not None)


def test_auto_continues_from_the_newest_complete_checkpoint(tmp_path):
  workdir.prepare(str(tmp_path), CONFIG)
  assert workdir.prepare(str(tmp_path), CONFIG).step is None
  checkpoint(tmp_path, 2, 10, '20.orbax-checkpoint-tmp-1')
  changed = {'lr': 0.1, 'log': {'every': 5}}
  assert workdir.prepare(str(tmp_path), changed, 'auto').step == 10
  assert workdir.prepare(str(tmp_path), changed, 'must').step == 10
  assert len((tmp_path / 'command.txt').read_text().splitlines()) == 4


def test_must_needs_a_checkpoint(tmp_path):
  with pytest.raises(ConfigError, match='resume=must, but there is no checkpoint'):
    workdir.prepare(str(tmp_path / 'new'), CONFIG, 'must')
  assert not os.listdir(tmp_path / 'new')


@pytest.mark.parametrize('resume', ['auto', 'must'])
def test_another_config_is_refused_with_the_difference(tmp_path, resume):
  workdir.prepare(str(tmp_path), CONFIG)
  with pytest.raises(ConfigError) as error:
    workdir.prepare(str(tmp_path), {'lr': 0.2, 'log': {'every': 9}}, resume)
  assert str(error.value).splitlines() == [
    f'{tmp_path} holds a run of another config (--resume=never --cleanup deletes it):',
    '  lr: 0.1 -> 0.2',
  ]
  assert json.loads((tmp_path / 'config.json').read_text()) == CONFIG


def test_never_needs_an_empty_folder_or_cleanup(tmp_path):
  workdir.prepare(str(tmp_path), CONFIG, 'never')
  checkpoint(tmp_path, 3)
  workdir.mark_done(str(tmp_path), 'ok')
  with pytest.raises(ConfigError, match='--cleanup'):
    workdir.prepare(str(tmp_path), CONFIG, 'never')
  assert workdir.prepare(str(tmp_path), CONFIG) == workdir.Workdir(str(tmp_path), 3, True)
  fresh = workdir.prepare(str(tmp_path), {'lr': 7}, 'never', cleanup=True)
  assert (fresh.step, fresh.done) == (None, False)
  assert json.loads((tmp_path / 'config.json').read_text()) == {'lr': 7}


def test_cleanup_never_touches_a_folder_that_holds_no_run(tmp_path):
  (tmp_path / 'thesis.tex').write_text('x')
  for resume, cleanup in (('auto', False), ('never', False), ('never', True)):
    with pytest.raises(ConfigError, match='holds no run'):
      workdir.prepare(str(tmp_path), CONFIG, resume, cleanup)
  assert os.listdir(tmp_path) == ['thesis.tex']


def test_cleanup_keeps_what_links_point_to(tmp_path):
  outside, path = tmp_path / 'outside', tmp_path / 'run'
  outside.mkdir()
  (outside / 'data').write_text('x')
  workdir.prepare(str(path), CONFIG)
  (path / 'link').symlink_to(outside)
  workdir.prepare(str(path), CONFIG, 'never', cleanup=True)
  assert (outside / 'data').exists() and not (path / 'link').exists()


@pytest.mark.parametrize('resume, cleanup', [('auto', True), ('must', True)])
def test_cleanup_needs_never(tmp_path, resume, cleanup):
  with pytest.raises(ConfigError, match='--resume=never'):
    workdir.prepare(str(tmp_path), CONFIG, resume, cleanup)


def test_bad_arguments_are_listed_together(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(
    ConfigError, match="(?s)2 problems.*'alway': choose from auto, must, never.*not a folder"
  ):
    workdir.prepare(str(tmp_path / 'file'), CONFIG, 'alway')


def test_unwritable_folder_is_an_error(tmp_path):
  with pytest.raises(ConfigError, match='workdir'):
    workdir.prepare('/proc/zppo_run', CONFIG)


def test_done_file(tmp_path):
  assert not workdir.is_done(str(tmp_path))
  workdir.mark_done(str(tmp_path), 'accuracy .9')
  assert workdir.is_done(str(tmp_path)) and (tmp_path / 'DONE').read_text() == 'accuracy .9\n'
