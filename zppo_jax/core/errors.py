"""Errors that the user can mend: shown as one message without a traceback, exit status 2."""

from __future__ import annotations

import traceback


def brief(error: BaseException) -> str:
  """'ValueError: why', whatever its own text does."""
  return ''.join(traceback.format_exception_only(error)).strip()


class UserError(ValueError):
  """Wrong input from the user: the message names the argument, the bound and the value."""


class ConfigError(UserError):
  """A config that cannot run; lists everything wrong with it."""


class RewardError(UserError):
  """A reward or verifier that breaks its contract: names the row and the value."""
