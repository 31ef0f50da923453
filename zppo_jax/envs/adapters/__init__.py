"""Text environments of other packages, one lazy module each; every package is an extra."""

import importlib
import types

from zppo_jax.core import errors


def require(package: str, extra: str) -> types.ModuleType:
  """Imports a package of an extra. UserError names the extra if the package is not installed."""
  try:
    return importlib.import_module(package)
  except ModuleNotFoundError as error:
    if error.name != package.partition('.')[0]:
      raise  # it is there, but something that it needs is not
    raise errors.UserError(f"{package} is missing: pip install 'zppo_jax[{extra}]'") from error
