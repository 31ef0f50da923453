"""Building meshes, sharding trees, and moving weights between role meshes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zppo_jax.core import trees
from zppo_jax.mesh import axes as axes_lib


def resolve_shape(shape: Mapping[str, int], num_devices: int) -> dict[str, int]:
  """Mesh shape with every axis present and one -1 filled in; the product equals `num_devices`.

  Raises ValueError on an unknown axis, two -1, or a product that does not match (JAX itself would
  silently leave devices idle).
  """
  unknown = [a for a in shape if a not in axes_lib.MESH_AXES]
  if unknown:
    raise ValueError(f'mesh: unknown axis {unknown[0]!r}; axes are {axes_lib.MESH_AXES}')
  full = {a: int(shape.get(a, 1)) for a in axes_lib.MESH_AXES}
  free = [a for a, n in full.items() if n == -1]
  if len(free) > 1:
    raise ValueError(f'mesh: at most one axis may be -1, got {free}')
  fixed = math.prod(n for n in full.values() if n != -1)
  if free and num_devices % fixed == 0:
    full[free[0]] = num_devices // fixed
  if math.prod(full.values()) != num_devices:
    raise ValueError(
      f'mesh: the product of {dict(shape)} must equal the device count, {num_devices}'
    )
  return full


def make_mesh(shape: Mapping[str, int], devices: Sequence | None = None) -> Mesh:
  """Mesh over `devices` (default: all) with the five axes of the house, all automatic."""
  devices = jax.devices() if devices is None else devices
  full = resolve_shape(shape, len(devices))
  types = (AxisType.Auto,) * len(full)
  grid = np.asarray(devices).reshape(tuple(full.values()))
  if devices[0].platform == 'tpu':  # neighbours on the torus; 64 x 4 on 16 x 16 splits an axis
    grid = mesh_utils.create_device_mesh(grid.shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, tuple(full), axis_types=types)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over the data axes; works for every leaf of a rollout."""
  return NamedSharding(mesh, axes_lib.spec(('batch',)))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def row_shards(mesh: Mesh) -> int:
  """How many parts the rows of a batch are cut into."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def publish(params, shardings):
  """Copies weights to another role's sharding and checks that they arrived there.

  Raises ValueError naming the first leaf whose sharding is not the one asked for.
  """
  moved = jax.device_put(params, shardings, may_alias=False)
  wanted = trees.named_leaves(shardings)
  for name, leaf in trees.named_leaves(moved).items():
    if not leaf.sharding.is_equivalent_to(wanted[name], leaf.ndim):
      raise ValueError(f'publish: {name} has sharding {leaf.sharding}, asked for {wanted[name]}')
  return moved
