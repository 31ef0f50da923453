"""Everything that a checkpoint holds and the train step changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zppo_jax.core import rng, trees, types
from zppo_jax.mesh import place
from zppo_jax.methods import api
from zppo_jax.models import heads, lora
from zppo_jax.models import params as params_lib
from zppo_jax.models.config import ModelConfig


@types.record
class TrainState:
  """Trainable roles, optimiser, counters, and the method's own state."""

  params: dict[str, Any]  # 'policy', and 'critic' where the method needs one
  opt_state: Any
  updates: types.Array  # i32[], optimiser steps taken
  skipped: types.Array  # i32[], mini-batches without signal
  version: types.Array  # i32[], rollout steps taken = policy version
  key_data: types.Array  # u32[...], root of all randomness
  method: Any


@dataclasses.dataclass(frozen=True)
class Optim:
  """AdamW with a global-norm clip; the defaults are ZPPO's."""

  learning_rate: float = 1e-6
  critic_learning_rate: float = 1e-5
  warmup_steps: int = 0
  decay_steps: int = 0  # 0 = constant, else cosine to zero over this many updates
  beta1: float = 0.9
  beta2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0


def schedule(peak: float, o: Optim) -> optax.Schedule:
  """Linear warm-up to `peak`, then constant or cosine."""
  after = (optax.cosine_decay_schedule(peak, o.decay_steps) if o.decay_steps
           else optax.constant_schedule(peak))
  if not o.warmup_steps:
    return after
  return optax.join_schedules([optax.linear_schedule(0.0, peak, o.warmup_steps), after],
                              [o.warmup_steps])


def _decayed(params):
  """Weight decay pulls to zero: the rates of a recurrent state have no business there."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: trees.path_name(path).split('.')[-1] not in ('decay_scale', 'decay_bias'),
    params)


def make_optimizer(o: Optim) -> optax.GradientTransformation:
  """One AdamW per trainable role, each with its own clip and learning rate."""
  def adamw(rate):
    return optax.chain(
      optax.clip_by_global_norm(o.clip_norm),
      optax.adamw(schedule(rate, o), b1=o.beta1, b2=o.beta2, eps=o.eps,
                  weight_decay=o.weight_decay, mask=_decayed))

  rates = {'policy': adamw(o.learning_rate), 'critic': adamw(o.critic_learning_rate)}

  def labels(params):
    frozen = sorted(set(params) - set(rates))
    if frozen:
      raise ValueError(f'params: roles {frozen} are frozen and cannot enter the optimiser, only '
                       f'{sorted(rates)} can')
    return {name: jax.tree.map(lambda _, name=name: name, tree) for name, tree in params.items()}

  return optax.multi_transform(rates, labels)


def specs(config: ModelConfig, needs: frozenset[str],
          adapters: lora.Settings | None = None) -> dict[str, Any]:
  """Abstract trees of the trainable roles."""
  found = {'policy': params_lib.abstract(config) if adapters is None else
           lora.abstract(config, adapters.rank, adapters.targets)}
  if 'critic' in needs:
    found['critic'] = heads.abstract_critic(config)
  return found


def create(config: ModelConfig, method: api.Method, optimizer, *, seed: int,
           policy=None, adapters: lora.Settings | None = None) -> TrainState:
  """Fresh state; `policy` overrides the random initial weights (a warm start)."""
  key = jax.random.key(seed)
  params = params_lib.materialise(specs(config, method.needs, adapters), rng.fold(key, 'init'))
  if policy is not None and adapters is None:
    params['policy'] = policy
  if 'critic' in params and policy is not None:
    params['critic'] = dataclasses.replace(
      params['critic'], backbone=jax.tree.map(jnp.copy, policy))
  zero = jnp.int32(0)
  return TrainState(params, optimizer.init(params), zero, zero, zero, jax.random.key_data(key),
                    method.init(rng.fold(key, 'method')))


def shardings(abstract_state: TrainState, config: ModelConfig, method: api.Method, mesh: Mesh,
              adapters: lora.Settings | None = None) -> TrainState:
  """Sharding of every leaf: parameters by the axis table, moments like their parameter, rest
  whole."""
  by_role = {name: params_lib.shardings(tree, mesh)
             for name, tree in specs(config, method.needs, adapters).items()}
  whole = NamedSharding(mesh, P())

  def of_opt(path, leaf):
    """A moment sits at .../<role>/<path inside the parameters>: look it up from the role on."""
    node = by_role
    names = [getattr(k, 'name', getattr(k, 'key', getattr(k, 'idx', None))) for k in path]
    starts = [i for i, n in enumerate(names) if n in ('mu', 'nu')]
    if not starts:
      return whole
    for name in names[starts[-1] + 1:]:
      node = node[name] if isinstance(node, dict | tuple | list) else getattr(node, name)
    return node if len(leaf.shape) else whole

  return TrainState(
    params=by_role,
    opt_state=jax.tree_util.tree_map_with_path(of_opt, abstract_state.opt_state),
    updates=whole, skipped=whole, version=whole, key_data=whole,
    method=jax.tree.map(lambda _: whole, abstract_state.method))


def put(state: TrainState, config: ModelConfig, method: api.Method, mesh: Mesh) -> TrainState:
  """State moved to its shardings on a mesh."""
  return place.publish(state, shardings(state, config, method, mesh))
