"""Command-line parsing whose errors are one line: a misspelt field, file, preset or flag."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags

from zppo_jax.core.errors import ConfigError, UserError
from zppo_jax.launch import config as config_lib

_FIELD = re.compile(r'--?(?:no)?config\.([^=]+)')


def define(flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines --config, --workdir (both required), --resume, --cleanup, and how processes join."""
  from ml_collections import config_flags

  config_flags.DEFINE_config_file(
    'config', None, 'Config file, `FILE.py` or `FILE.py:preset`.', flag_values, lock_config=True
  )
  flags.DEFINE_string('workdir', None, 'Folder of the run.', flag_values=flag_values)
  flags.DEFINE_enum(
    'resume',
    'auto',
    ['auto', 'must', 'never'],
    'Continue the run in workdir: if there is one, always, or never.',
    flag_values=flag_values,
  )
  flags.DEFINE_bool(
    'cleanup', False, 'With --resume=never: delete the former run.', flag_values=flag_values
  )
  flags.DEFINE_string(
    'coordinator_address', None, 'HOST:PORT of the first of several processes; found by itself on '
    'Cloud TPU, GKE, SLURM and Open MPI.', flag_values=flag_values
  )
  flags.DEFINE_integer(
    'num_processes', None, 'With --coordinator_address: processes of the run.',
    flag_values=flag_values
  )
  flags.DEFINE_integer(
    'process_id', None, 'With --coordinator_address: number of this process.',
    flag_values=flag_values
  )
  flags.mark_flags_as_required(['config', 'workdir'], flag_values)


def parse(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """The positional arguments, flags set. UserError in one line, ConfigError if it is the config."""
  check_config(argv)
  try:
    return flag_values(list(argv))
  except flags.Error as error:
    missing = re.match(r'flag --(\w+)=None: ', str(error))
    raise UserError(f'--{missing[1]} is required' if missing else _one_line(error)) from error
  except (TypeError, ValueError, AttributeError, KeyError, OSError) as error:
    raise UserError(f'{type(error).__name__}: {_one_line(error)}') from error


def flags_parser(argv: Sequence[str]) -> list[str]:
  """`parse` for `absl.app.run`: an error is one line on stderr and exit status 2."""
  try:
    return parse(argv)
  except UserError as error:
    kind = 'config' if isinstance(error, ConfigError) else 'flag'
    print(f'{kind} error: {error}', file=sys.stderr)
    sys.exit(2)


def check_config(argv: Sequence[str]) -> None:
  """Loads the config that `argv` names, if any, and looks up every overridden field."""
  value = flag_value(argv, 'config')
  if value is None:
    return
  path, _, preset = value.partition(':')
  loaded = load(path, preset if ':' in value else None)
  known = config_lib.flatten(loaded)
  for argument in argv[1:]:
    if argument == '--':
      return
    field = _FIELD.match(argument)
    if field and not _has_field(loaded, field[1]):
      raise ConfigError(f'{field[1]!r}: {_closest_field(field[1], loaded, known)} ({path})')


def load(path: str, preset: str | None = None) -> Any:
  """`get_config(preset)` of a config file; ConfigError names the file and line of any failure."""
  if not os.path.isfile(path):
    folder = os.path.dirname(path) or '.'
    names = sorted(n for n in os.listdir(folder)) if os.path.isdir(folder) else []
    close = difflib.get_close_matches(os.path.basename(path), names, n=1)
    hint = f': did you mean {os.path.join(os.path.dirname(path), close[0])!r}?' if close else ''
    raise ConfigError(f'no config file {path!r}{hint}')
  spec = importlib.util.spec_from_file_location('config_being_checked', path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(*([] if preset is None else [preset]))
  except Exception as error:
    raise ConfigError(f'{_describe(error)} ({_location(error, path)})') from error
  if not hasattr(config, 'to_dict'):
    raise ConfigError(f'get_config must return a ConfigDict, got {type(config).__name__} ({path})')
  return config


def _describe(error: Exception) -> str:
  if isinstance(error, SyntaxError):
    return f'SyntaxError: {error.msg}'
  plain = isinstance(error, ValueError) and str(error)
  return _one_line(error) if plain else f'{type(error).__name__}: {_one_line(error)}'


def _location(error: Exception, path: str) -> str:
  """`file, line n` of the innermost frame that lies in the folder of the config file."""
  if isinstance(error, SyntaxError) and error.filename and error.lineno:
    return f'{os.path.relpath(error.filename)}, line {error.lineno}'
  folder = os.path.dirname(os.path.abspath(path))
  frames = [
    frame
    for frame in traceback.extract_tb(error.__traceback__)
    if os.path.dirname(os.path.abspath(frame.filename)) == folder
  ]
  return f'{os.path.relpath(frames[-1].filename)}, line {frames[-1].lineno}' if frames else path


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())


def flag_value(argv: Sequence[str], name: str) -> str | None:
  """The last value of `--name=value` or `--name value`, as absl reads it."""
  value = None
  for i, argument in enumerate(argv[1:], start=1):
    if argument == '--':
      break
    if re.fullmatch(f'--?{name}', argument) and i + 1 < len(argv):
      value = argv[i + 1]
    elif match := re.match(f'--?{name}=(.*)', argument, re.DOTALL):
      value = match[1]
  return value


def _has_field(config: Any, dotted: str) -> bool:
  for key in dotted.split('.'):
    name, index = re.fullmatch(r'([^\[]*)((?:\[\d+\])*)', key).groups() if key else ('', '')
    if not hasattr(config, 'keys') or name not in config:
      return False
    config = config[name]
    if index:
      return True  # absl checks the position
  return True


def _closest_field(dotted: str, config: Any, known: dict[str, Any]) -> str:
  """The closest sibling, else the closest dotted name, else the siblings."""
  parent, lead = config, ''
  *above, leaf = dotted.split('.')
  for key in above:
    if not hasattr(parent, 'keys') or key not in parent:
      break
    parent, lead = parent[key], f'{lead}{key}.'
  siblings = [lead + key for key in parent] if hasattr(parent, 'keys') else []
  same_leaf = [name for name in known if name.rpartition('.')[2] == leaf]
  close = difflib.get_close_matches(dotted, siblings, n=1) or same_leaf
  close = close or difflib.get_close_matches(dotted, known, n=1)
  if close:
    return f'did you mean {close[0]!r}?'
  return f'no such field; known: {", ".join(siblings or known)}'
