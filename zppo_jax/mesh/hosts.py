"""Several processes, one program: host copies of sharded arrays, and facts that all agree on.

Every process runs the same host code on the same values, so every process calls these functions in
the same order. With one process they cost nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zppo_jax.core.errors import UserError


def is_first() -> bool:
  """Whether this process writes files and prints."""
  return jax.process_index() == 0


def fetch(tree):
  """Host copies (numpy) of a tree of arrays, whole on every process, in one transfer."""
  def whole(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return x
    return jax.device_put(x, NamedSharding(x.sharding.mesh, P()))

  return jax.device_get(jax.tree.map(whole, tree))


def gather(value: Any) -> list[Any]:
  """The JSON value of every process, in their order, on every process."""
  count = jax.process_count()
  if count == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = _stack(np.asarray([len(data)], np.int32))[:, 0]
  rows = _stack(np.pad(data, (0, int(sizes.max()) - len(data))))
  return [json.loads(rows[i, :sizes[i]].tobytes()) for i in range(count)]


def _stack(own: np.ndarray) -> np.ndarray:
  """[processes, ...] of one equally shaped array per process."""
  devices = np.asarray(jax.devices()).reshape(jax.process_count(), -1)
  mesh = Mesh(devices, ('process', 'local'))
  parts = jax.make_array_from_process_local_data(NamedSharding(mesh, P('process')), own[None])
  return np.asarray(jax.device_put(parts, NamedSharding(mesh, P())))


def agree(asked: bool) -> bool:
  """Whether any process asks."""
  return any(gather(bool(asked)))


def share(fn: Callable[[Sequence[int]], list], count: int) -> list:
  """`fn` of all indices below `count`, a JSON value each, cut among the processes."""
  parts = np.array_split(np.arange(count), jax.process_count())
  found = fn(parts[jax.process_index()].tolist())
  return [x for part in gather(found) for x in part]


def on_first(fn: Callable[[], Any]) -> Any:
  """What `fn` gives on the first process (JSON), on every process; its UserError too."""
  found = None
  if is_first():
    try:
      found = ['value', fn()]
    except UserError as error:
      if jax.process_count() == 1:
        raise
      found = ['error', str(error)]
  kind, value = gather(found)[0]
  if kind == 'error':
    raise UserError(value)
  return value
