"""One table from logical axis names to mesh axes; every sharding of the library comes from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def constrain_rows(tree):
  """`constrain` of every array of a tree whose first axis counts rows."""
  return jax.tree.map(lambda x: constrain(x, 'batch', *(None,) * (x.ndim - 1)), tree)


def shards(name: str, size: int) -> int:
  """Parts that a dim of this name and size is cut into under the mesh in use."""
  mesh = jax.sharding.get_abstract_mesh()
  part = None if mesh.empty else fit((name,), (size,), mesh)[0]
  count = 1
  for axis in (part,) if isinstance(part, str) else (part or ()):
    count *= mesh.shape[axis]
  return count


def on_shards(fn: Callable, ins: Sequence[tuple], outs: Sequence[tuple]) -> Callable:
  """`fn` on the shards of arrays with these logical axes, for code that XLA cannot partition.

  `fn` must treat every named axis entry by entry. An axis that some array cannot split evenly stays
  whole everywhere. The identity without a mesh, or on one device.
  """
  def call(*args):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
      return fn(*args)
    whole = {name for names, x in zip(ins, args) for name, size, part in zip(
      names, x.shape, fit(names, x.shape, mesh)) if name and part is None}

    def specs(all_names):
      return [fit(tuple(None if n in whole else n for n in names), (0,) * len(names), mesh)
              for names in all_names]

    return jax.shard_map(fn, in_specs=tuple(specs(ins)), out_specs=tuple(specs(outs)),
                         check_vma=False)(*args)

  return call
