"""Small helpers over pytrees of arrays."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def path_name(path) -> str:
  """'blocks.0.mixer.query' for a jax key path."""
  return '.'.join(str(getattr(k, 'name', getattr(k, 'key', getattr(k, 'idx', k)))) for k in path)


def named_leaves(tree, is_leaf: Callable | None = None) -> dict[str, object]:
  """Flat {dotted path: leaf}."""
  flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
  return {path_name(path): leaf for path, leaf in flat}


def concat(trees: Sequence, axis: int = 0):
  """Concatenates equal trees of arrays along one axis."""
  return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis), *trees)


def pad_axis(x, size: int, axis: int, value=0):
  """Pads one axis of an array on the right up to `size`."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths, constant_values=value)


def select(flag, on_true, on_false):
  """Leafwise where on a scalar flag."""
  return jax.tree.map(lambda a, b: jnp.where(flag, a, b), on_true, on_false)


def differences(wanted: dict[str, object], found: dict[str, object]) -> list[tuple]:
  """(path, wanted, found) of named leaves that differ in (shape, dtype); None: no such leaf."""
  facts = lambda x: None if x is None else (tuple(x.shape), str(np.dtype(x.dtype)))
  rows = [(k, facts(wanted.get(k)), facts(found.get(k))) for k in sorted(wanted.keys() | found)]
  return [row for row in rows if row[1] != row[2]]


def num_bytes(tree) -> int:
  """Bytes of all leaves, by shape and dtype (abstract leaves count too)."""
  return sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def num_params(tree) -> int:
  """Number of scalars in all leaves."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
