"""What a launch recipe accepts; each check returns its value or raises UserError."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zppo_jax.core.errors import UserError
from zppo_jax.launch.flags import flag_value

MAX_NAME = 40  # of xpk workloads and GKE clusters; TPU VMs allow more


def name(argument: str, value: str) -> str:
  """A DNS label, as xpk and gcloud ask for."""
  if len(value) > MAX_NAME or not re.fullmatch(r'[a-z]([-a-z0-9]*[a-z0-9])?', value):
    raise UserError(f'{argument} must be at most {MAX_NAME} lower case letters, digits and dashes, '
                    f'starting with a letter and not ending with a dash; got {value!r}')
  return value


def word(argument: str, value: str) -> str:
  """A value for a line that no shell reads: nothing in it may need quoting."""
  if not re.fullmatch(r'[\w.,:@/+-]+', value, re.ASCII):
    raise UserError(f'{argument} must be letters, digits and any of _ . , : @ / + -; got {value!r}')
  return value


def count(argument: str, value: int) -> int:
  """At least 1."""
  if value < 1:
    raise UserError(f'{argument} must be at least 1; got {value}')
  return value


def experiment(args: Sequence[str], *, shared: bool) -> tuple[str, ...]:
  """Arguments of experiments.train; with `shared`, a workdir that every host and restart sees."""
  given = {wanted: flag_value(['', *args], wanted) for wanted in ('config', 'workdir')}
  missing = [f'--{wanted}' for wanted, value in given.items() if not value]
  if missing:
    raise UserError(f'arguments of the experiment: {", ".join(missing)} missing; they follow --')
  workdir = given['workdir']
  if '://' in workdir or shared and not workdir.startswith('/'):
    raise UserError('workdir must be the absolute path of a folder that all hosts mount (a bucket '
                    f'too), as a host and its disk may be replaced; got {workdir!r}')
  return tuple(args)


def copied(config: str, sources: Sequence[str]) -> str:
  """A config file inside what is copied to the hosts, or on a disk that they mount."""
  if not config.startswith('/') and config.split('/')[0] not in sources:
    raise UserError(f'config must lie in {", ".join(sources)}, which are copied to the hosts, or '
                    f'on a disk that they mount; got {config!r}')
  return config
