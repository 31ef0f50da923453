"""Runs an experiment: flags in, one record out; user errors end with one message and status 2."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from zppo_jax.core.errors import UserError
from zppo_jax.launch import distributed
from zppo_jax.launch import flags as flags_lib

USER_ERROR, PREEMPTED = 2, 42  # exit statuses; 42: saved, restart me; 1: any other failure


@dataclasses.dataclass(frozen=True)
class Launch:
  """What the command line asks for."""

  config: Any  # locked ConfigDict
  workdir: str
  resume: str  # 'auto', 'must' or 'never'
  cleanup: bool


def run(main: Callable[[Launch], int | None]) -> None:
  """Parses the flags, calls `main(launch)`, exits with its status (None is 0).

  Flags: --config=FILE.py:preset, --config.field=value, --workdir, --resume, --cleanup, jax's own
  --jax_*, and --coordinator_address, --num_processes, --process_id where several processes of one
  run do not find each other by themselves. A UserError from `main` becomes one message on stderr
  without a traceback.
  """
  import jax

  flags_lib.define()
  jax.config.config_with_absl()  # defines --jax_*; app.run applies them
  app.run(lambda argv: _call(main, argv), flags_parser=flags_lib.flags_parser)


def _call(main: Callable[[Launch], int | None], argv: Sequence[str]) -> int | None:
  values = flags.FLAGS
  logging.getLogger('absl').setLevel(logging.WARNING)  # orbax reports every file it writes
  try:
    if len(argv) > 1:
      raise UserError(f'unexpected argument {argv[1]!r}: flags start with --')
    distributed.start(values.coordinator_address, values.num_processes, values.process_id)
    return main(Launch(values.config, values.workdir, values.resume, values.cleanup))
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return USER_ERROR
