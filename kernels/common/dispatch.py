"""Choice of an implementation: the fastest that can run here, or the one that was named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp


def platform() -> str:
  """Platform that the call is traced for: of the abstract device of the mesh in scope, if any."""
  device = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
  if device is not None:
    kind = device.device_kind.lower()
    return 'tpu' if 'tpu' in kind else 'gpu' if 'nvidia' in kind else 'cpu'
  return jax.default_backend()


def require(target: str, interpret: bool | None, dtype) -> bool:
  """Whether a Pallas kernel for `target` runs as XLA operations: `interpret`, or False if None.

  Raises NotImplementedError on another platform, or for a dtype that such kernels do not have.
  """
  if interpret is None and platform() != target:
    raise NotImplementedError(f'a {target.upper()} is needed, the platform is {platform()}')
  if dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(f'dtype {dtype} is not one of float32, bfloat16')
  return bool(interpret)


def run(op: str, table: Mapping[str, Callable], choice: str | Sequence[str] | None,
        default: Sequence[str], *args, **kwargs):
  """Calls the first implementation of `choice` that can run; None takes those of `default`.

  An implementation says that it cannot run here by NotImplementedError with the reason. Raises
  ValueError on an unknown name and NotImplementedError with every reason when none can run.
  """
  names = default if choice is None else (choice,) if isinstance(choice, str) else tuple(choice)
  unknown = [n for n in names if n not in table]
  if unknown or not names:
    raise ValueError(f'{op}: implementation={choice!r}, expected of {sorted(table)}, or None')
  reasons = []
  for name in names:
    try:
      return table[name](*args, **kwargs)
    except NotImplementedError as reason:
      reasons.append(f'{name}: {reason}')
  raise NotImplementedError(f'{op}: no implementation can run here: ' + '; '.join(reasons))
