"""From sampled parts to a batch for the train step: mini-batch layout, scores, credit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from zppo_jax.core import trees, types
from zppo_jax.methods import api
from zppo_jax.models import heads
from zppo_jax.models.config import ModelConfig
from zppo_jax.sampling import score as score_lib
from zppo_jax.train.step import Part, StepSettings, policy_of

Array = jax.Array


def deal(valid: Array, key: Array, count: int) -> Array:
  """Order of group slots that deals the valid ones evenly over `count` mini-batches, i32[P'].

  P' = P rounded up to a multiple of count; entries >= P stand for empty slots. A random order of
  the valid slots is dealt like cards, so mini-batches differ by at most one group per part.
  """
  slots = valid.shape[0]
  total = -(-slots // count) * count
  noise = jnp.where(valid, jax.random.uniform(key, (slots,)), 2.0)
  order = jnp.concatenate([jnp.argsort(noise), jnp.arange(slots, total)]).astype(jnp.int32)
  return order.reshape(-1, count).T.reshape(-1)


def arrange(rollout: types.Rollout, group_size: int, key: Array, count: int) -> types.Rollout:
  """Rows of a part in mini-batch order; a group is never split. Empty slots become invalid rows."""
  slots = rollout.valid.shape[0] // group_size
  order = deal(rollout.valid.reshape(slots, group_size).any(axis=1), key, count)
  real = order < slots
  source = jnp.minimum(order, slots - 1)

  def move(x):
    grouped = x.reshape(slots, group_size, *x.shape[1:])[source]
    keep = real.reshape(-1, *(1,) * (grouped.ndim - 1))
    return jnp.where(keep, grouped, jnp.zeros_like(grouped)).reshape(-1, *x.shape[1:])

  return jax.tree.map(move, rollout)


def join(parts: Sequence, size: int):
  """All parts (rollouts or scores) as one, token axes padded on the right to `size`."""
  return trees.concat([jax.tree.map(
    lambda x: trees.pad_axis(x, size, 1) if x.ndim == 2 else x, p) for p in parts])


def cut(signal: types.Signal, rollouts: Sequence[types.Rollout]) -> list[types.Signal]:
  """Inverse of join for a signal."""
  def part(begin: int, rows: int, size: int) -> types.Signal:
    end = begin + rows
    return jax.tree.map(lambda x: x[begin:end, :size] if x.ndim == 2 else x[begin:end], signal)

  starts = itertools.accumulate([0, *(r.tokens.shape[0] for r in rollouts[:-1])])
  return [part(begin, *r.tokens.shape) for begin, r in zip(starts, rollouts)]


def make_scorer(config: ModelConfig, needs: frozenset[str], s: StepSettings,
                role_configs: dict[str, ModelConfig]):
  """scorer(params, rollout, roles, pieces, group) -> Scores, row blocks one after the other."""

  def one(params, roles, rollout: types.Rollout, group: int) -> types.Scores:
    def logp(role_config, role_params):
      return score_lib.score(role_config, role_params, rollout, window=s.window,
                             temperature=s.temperature, chunk=s.chunk, group=group)

    old = logp(config, params['policy']) if 'old_logp' in needs else None
    return types.Scores(
      old_logp=old.logp if old else None, entropy=old.entropy if old else None,
      ref_logp=logp(config, roles['reference']).logp if 'reference' in needs else None,
      teacher_logp=(logp(role_configs['teacher'], roles['teacher']).logp
                    if 'teacher_logp' in needs else None),
      value=heads.values(config, params['critic'], rollout.tokens,
                         segment_ids=rollout.segment_ids, positions=rollout.positions)
      if 'critic' in needs else None)

  def scorer(params, rollout: types.Rollout, roles: dict[str, Any], pieces: int,
             group: int = 1) -> types.Scores:
    params = params | {'policy': policy_of(config, s, params, roles.get('base'))}
    split = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), rollout)
    group = math.gcd(group, split.valid.shape[1])  # a micro-batch may cut a group
    scores = jax.lax.map(lambda r: one(params, roles, r, group), split)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), scores)

  return scorer


def make_prepare(config: ModelConfig, method: api.Method, s: StepSettings,
                 role_configs: dict[str, ModelConfig]):
  """prepare(params, method state, rollouts, key, roles, group_sizes) -> (method state, parts)."""
  scorer = make_scorer(config, method.needs, s, role_configs)
  count = method.iterations

  def prepare(params, state, rollouts: tuple[types.Rollout, ...], key: Array,
              roles: dict[str, Any], group_sizes: tuple[int, ...]):
    arranged = [arrange(r, g, jax.random.fold_in(key, i), count)
                for i, (r, g) in enumerate(zip(rollouts, group_sizes))]
    shared = group_sizes if s.share_prompts else (1,) * len(group_sizes)
    scores = [scorer(params, r, roles, count * s.micro_batches, g)
              for r, g in zip(arranged, shared)]
    scores = [types.Scores(**{**vars(x), 'minibatch': jnp.repeat(
      jnp.arange(count), r.valid.shape[0] // count)}) for x, r in zip(scores, arranged)]
    size = max(r.tokens.shape[1] for r in arranged)
    state, signal = method.credit(state, join(arranged, size), join(scores, size))
    return state, tuple(Part(r, x, g) for r, x, g in zip(arranged, cut(signal, arranged), shared))

  return prepare
