"""One checkpoint item per concern, all at the same step: state, rollouts in flight, and host
facts."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from zppo_jax.core import trees
from zppo_jax.core.errors import UserError


def make_manager(path: str, *, every: int = 1, keep: int = 2) -> ocp.CheckpointManager:
  """Orbax manager of the steps under `path`; saves in the background, keeps the newest `keep`."""
  return ocp.CheckpointManager(
    path, item_handlers={'state': ocp.StandardCheckpointHandler(),
                         'pending': ocp.StandardCheckpointHandler(),
                         'meta': ocp.JsonCheckpointHandler()},
    options=ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=keep))


def save(manager: ocp.CheckpointManager, step: int, *, state: Any, pending: Any,
         meta: dict[str, Any], force: bool = False) -> bool:
  """Saves if the interval says so (or `force`); True when it did.

  `pending` is a tuple of pytrees of rollouts in flight (may be empty); `meta` is JSON.
  """
  # An empty tree cannot be saved, so a marker leaf is always there.
  pending = {'rollouts': list(pending), 'count': np.int32(len(pending))}
  return manager.save(step, force=force, args=ocp.args.Composite(
    state=ocp.args.StandardSave(state), pending=ocp.args.StandardSave(pending),
    meta=ocp.args.JsonSave(meta)))


def _line(path: str, want, have) -> str:
  if want is None or have is None:
    return f'{path}: ' + ('only in' if want is None else 'not in') + ' the checkpoint'
  return f'{path}: checkpoint has {have}, this run {want}'


def _tree(metadata):
  return getattr(metadata, 'tree', metadata)


def _check_same(step: int, wanted, saved) -> None:
  found = trees.differences(trees.named_leaves(wanted), trees.named_leaves(
    saved, is_leaf=lambda x: hasattr(x, 'shape')))
  if found:
    shown = '\n  '.join(_line(*row) for row in found[:20])
    raise UserError(f'checkpoint {step} does not fit this run:\n  {shown}')


def restore(manager: ocp.CheckpointManager, step: int, *, state: Any, pending: Any = None):
  """(state, pending, meta) at a step; `state` is an abstract tree with shardings.

  Raises UserError that lists the leaves whose tree or shape differs.
  """
  _check_same(step, state, _tree(manager.item_metadata(step)['state']))
  args = {'state': ocp.args.StandardRestore(state), 'meta': ocp.args.JsonRestore(),
          'pending': ocp.args.StandardRestore(pending)}
  out = manager.restore(step, args=ocp.args.Composite(**args))
  return out['state'], out['pending']['rollouts'], out['meta']


def abstract(tree, shardings=None):
  """Shapes, dtypes and shardings of a tree of arrays: what restore wants."""
  if shardings is None:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
                      shardings)


def load_params(path: str, template: Any, name: str = 'policy'):
  """Parameters of one role in the newest checkpoint under `path`, and nothing else of it.

  `template` is an abstract tree with shardings. Raises UserError that lists the leaves that differ.
  """
  with make_manager(path) as manager:
    step = manager.latest_step()
    if step is None:
      raise UserError(f'no checkpoint in {path}')
    _check_same(step, template, _tree(manager.item_metadata(step)['state'])['params'][name])
  item = {'params': {name: template}}
  restore_args = ocp.checkpoint_utils.construct_restore_args(item)
  with ocp.PyTreeCheckpointer() as reader:
    out = reader.restore(os.path.join(path, str(step), 'state'), args=ocp.args.PyTreeRestore(
      item=item, restore_args=restore_args, partial_restore=True))
  return out['params'][name]
