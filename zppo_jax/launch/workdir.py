"""The folder of one run: `config.json`, `command.txt`, `git.txt`, `checkpoints/<step>/`, `DONE`."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from typing import Any

from zppo_jax.core.errors import ConfigError
from zppo_jax.launch import config as config_lib
from zppo_jax.mesh import hosts

CHECKPOINTS, DONE = 'checkpoints', 'DONE'
RESUME = ('auto', 'must', 'never')


@dataclasses.dataclass(frozen=True)
class Workdir:
  """A prepared folder; `step` is that of the newest checkpoint, None where the run starts."""

  path: str
  step: int | None
  done: bool

  @property
  def checkpoints(self) -> str:
    """The folder of the checkpoints, sub-folders named by step."""
    return os.path.join(self.path, CHECKPOINTS)


def latest_step(workdir: str) -> int | None:
  """Step of the newest complete checkpoint, or None."""
  try:
    names = os.listdir(os.path.join(workdir, CHECKPOINTS))
  except (FileNotFoundError, NotADirectoryError):
    return None
  return max((int(name) for name in names if name.isdecimal()), default=None)


def is_done(workdir: str) -> bool:
  """Whether the run in `workdir` has finished."""
  return os.path.exists(os.path.join(workdir, DONE))


def mark_done(workdir: str, text: str = '') -> None:
  """Records that the run has finished."""
  _write(os.path.join(workdir, DONE), text + '\n')


def prepare(workdir: str, config: Any, resume: str = 'auto', cleanup: bool = False) -> Workdir:
  """Creates or re-opens the folder of a run and writes its facts.

  `auto` continues a run of the same config, if there is one; `must` demands a checkpoint; `never`
  demands an empty folder, or `cleanup`, which deletes a former run. Raises ConfigError for an
  unwritable folder, one that holds another run (with the differences), or other files. The first
  process does the work for all.
  """
  return Workdir(**hosts.on_first(
    lambda: dataclasses.asdict(_prepare(workdir, config, resume, cleanup))))


def _prepare(workdir: str, config: Any, resume: str, cleanup: bool) -> Workdir:
  problems = config_lib.check_enum('resume', resume, RESUME)
  if cleanup and resume != 'never':
    problems.append(config_lib.Problem('cleanup', 'deletes the run: it needs --resume=never'))
  config_lib.raise_all(problems + config_lib.check_paths_writable(workdir))
  try:
    os.makedirs(workdir, exist_ok=True)
    if os.listdir(workdir):
      _check_former(workdir, config, resume, cleanup)
    if resume == 'must' and latest_step(workdir) is None:
      raise ConfigError(f'resume=must, but there is no checkpoint in {workdir}/{CHECKPOINTS}')
    _write(os.path.join(workdir, 'config.json'), config_lib.to_json(config))
    os.makedirs(os.path.join(workdir, CHECKPOINTS), exist_ok=True)
    with open(os.path.join(workdir, 'command.txt'), 'a', encoding='utf-8') as file:
      file.write(shlex.join(sys.orig_argv) + '\n')
    commit = git_commit()
    if commit:
      _write(os.path.join(workdir, 'git.txt'), commit + '\n')
  except OSError as error:
    raise ConfigError(f'workdir {workdir}: {error.strerror or error}') from error
  return Workdir(os.path.abspath(workdir), latest_step(workdir), is_done(workdir))


def _check_former(workdir: str, config: Any, resume: str, cleanup: bool) -> None:
  """Refuses, deletes or accepts what the folder holds."""
  try:
    with open(os.path.join(workdir, 'config.json'), encoding='utf-8') as file:
      former = json.load(file)
  except (FileNotFoundError, json.JSONDecodeError):
    raise ConfigError(
      f'{workdir} is not empty and holds no run (no readable config.json): choose another folder'
    ) from None
  if cleanup:
    _empty(workdir)
  elif resume == 'never':
    raise ConfigError(f'{workdir} holds a run: add --cleanup to delete it, or --resume=auto')
  elif config_lib.config_hash(former) != config_lib.config_hash(config):
    exclude = config_lib.NOT_PART_OF_THE_RUN
    changes = config_lib.diff_configs(
      config_lib.without(former, exclude), config_lib.without(config, exclude)
    )
    head = f'{workdir} holds a run of another config (--resume=never --cleanup deletes it):'
    raise ConfigError('\n  '.join([head, *changes]))


def _empty(workdir: str) -> None:
  for entry in os.scandir(workdir):
    if entry.is_dir(follow_symlinks=False):
      shutil.rmtree(entry.path)
    else:
      os.remove(entry.path)


def _write(path: str, text: str) -> None:
  temporary = f'{path}.tmp'
  with open(temporary, 'w', encoding='utf-8') as file:
    file.write(text)
  os.replace(temporary, path)


def git_commit() -> str | None:
  """Commit of the checkout that holds this package, marked if it has changes; None without one."""
  folder = os.path.dirname(os.path.abspath(__file__))
  try:
    commit = _git(folder, 'rev-parse', 'HEAD')
    dirty = _git(folder, 'status', '--porcelain', '--untracked-files=no')
  except (OSError, subprocess.SubprocessError):
    return None
  return f'{commit} (with local changes)' if dirty else commit


def _git(folder: str, *args: str) -> str:
  return subprocess.run(
    ['git', '-C', folder, *args], capture_output=True, text=True, check=True, timeout=10
  ).stdout.strip()
