"""One table from logical axis names to mesh axes; every sharding of the library comes from it."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec as P

MESH_AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')

# Logical axis -> mesh axes. A name that is not here is a programming error.
RULES: dict[str | None, str | tuple[str, ...] | None] = {
  None: None,
  'batch': ('data', 'fsdp'),  # rows of activations, rollouts, caches
  'length': 'context',
  'vocab': 'tensor',
  'embed': 'fsdp',  # parameters only: activations keep their features whole
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'head_dim': None,
  'mlp': 'tensor',
  'experts': 'expert',
  'layers': None,
  'features': None,
}


def spec(axes: tuple[str | None, ...]) -> P:
  """PartitionSpec of an array whose dims carry these logical names."""
  unknown = [a for a in axes if a not in RULES]
  if unknown:
    raise ValueError(f'axes: unknown logical axis {unknown[0]!r}; known: {sorted(map(str, RULES))}')
  return P(*(RULES[a] for a in axes))


def fit(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> P:
  """Like `spec`, but a dim that its mesh axes do not divide stays whole (8 KV heads on 16
  chips)."""
  parts = []
  for size, part in zip(shape, spec(axes)):
    names = (part,) if isinstance(part, str) else (part or ())
    count = 1
    for name in names:
      count *= mesh.shape[name]
    parts.append(part if count > 1 and size % count == 0 else None)
  return P(*parts)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Sharding constraint by logical names under the mesh in use; the identity without one."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, fit(axes, x.shape, mesh))
