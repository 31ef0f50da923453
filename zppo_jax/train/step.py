"""The one jitted train step: I mini-batches, each of M micro-batches, one optimiser step each.

Denominators are those of the whole mini-batch, computed before micro-batching, so neither the split
nor the number of devices changes loss or gradient. Dims: I mini-batches, M micro-batches, n rows
each; the rows of a part are laid out as I * M * n.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zppo_jax.core import trees, types
from zppo_jax.mesh import axes
from zppo_jax.methods import api
from zppo_jax.models import decoder, heads, lora
from zppo_jax.models.config import ModelConfig
from zppo_jax.ops import importance
from zppo_jax.sampling import score as score_lib
from zppo_jax.train.state import TrainState

Array = jax.Array


@types.record
class Part:
  """Rows of one shape with their worth."""

  rollout: types.Rollout
  signal: types.Signal
  group: int = types.static(default=1)  # neighbouring rows that share their prompt


@dataclasses.dataclass(frozen=True)
class StepSettings:
  """Static facts of the step. `window` covers every loss token of a row."""

  window: int
  temperature: float = 1.0  # of the sampler: log-probs are taken at it
  micro_batches: int = 1
  chunk: int = 1024  # tokens per vocabulary block
  share_prompts: bool = True  # rows of a group run their common prompt once
  taps: tuple[str, ...] = ()
  adapters: lora.Settings | None = None  # the policy is a frozen base with trained adapters


def policy_of(config: ModelConfig, s: StepSettings, params: dict[str, Any], base) -> Any:
  """Weights of the policy: the trained ones, or the base with the trained adapters."""
  if s.adapters is None:
    return params['policy']
  return lora.merge(config, base, params['policy'], alpha=s.adapters.alpha)


def _vocabulary(config: ModelConfig, params) -> Array:
  """Unembedding of the ids that can be sampled: padding rows would take mass in a divergence."""
  return decoder.unembedding(params)[:, :config.num_valid]


def model_outputs(config: ModelConfig, params: dict[str, Any], rollout: types.Rollout,
                  frozen: dict[str, tuple[ModelConfig, Any]], s: StepSettings,
                  group: int = 1) -> api.Outputs:
  """Everything that terms may read, for one micro-batch."""
  group = math.gcd(group, rollout.tokens.shape[0])  # a micro-batch may cut a group
  policy = policy_of(config, s, params, frozen['base'][1] if s.adapters else None)
  scored = score_lib.score(config, policy, rollout, window=s.window,
                           temperature=s.temperature, chunk=s.chunk, taps=s.taps, group=group)
  value = None
  if 'critic' in params:
    value = heads.values(config, params['critic'], rollout.tokens,
                         segment_ids=rollout.segment_ids, positions=rollout.positions)
  roles = {}
  for name, (role_config, role_params) in frozen.items():
    if name == 'base':
      continue
    hidden = score_lib.states(role_config, role_params, rollout, window=s.window,
                              group=group)[0]
    roles[name] = jax.lax.stop_gradient(
      api.RoleOutputs(hidden, _vocabulary(role_config, role_params), role_config.logit_cap))
  return api.Outputs(scored.logp, scored.entropy, scored.hidden,
                     _vocabulary(config, policy), scored.start, scored.taps, value, roles,
                     config.logit_cap)


def merge_metrics(a: api.Metrics, b: api.Metrics) -> api.Metrics:
  """Sums (numerator, denominator) pairs; names ending in _max take the maximum."""
  out = dict(a)
  for name, (num, den) in b.items():
    if name not in out:
      out[name] = (num, den)
    elif name.endswith('_max'):
      out[name] = (jnp.maximum(out[name][0], num), den)
    else:
      out[name] = (out[name][0] + num, out[name][1] + den)
  return out


def finish_metrics(metrics: api.Metrics) -> dict[str, Array]:
  """Scalars; a mean over nothing is 0."""
  return {name: num if name.endswith('_max') else num / jnp.maximum(den, 1e-20)
          for name, (num, den) in metrics.items()}


def denominators(terms: Sequence[api.Term], outputs: Sequence[Any],
                 signals: Sequence[types.Signal]) -> list[Array]:
  """Sum of each term's denominator over all parts; model outputs are blank: it may not read
  them."""
  blank = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), o) for o in outputs]
  return [sum(term(o, s)[1] for o, s in zip(blank, signals)) for term in terms]


def mismatch_metrics(logp: Array, rollout: types.Rollout) -> api.Metrics:
  """Sampler against scorer on rows that the policy sampled."""
  mask = rollout.loss_mask & (rollout.valid & (rollout.role_id == types.POLICY))[:, None]
  sampler = rollout.behavior_logp
  if rollout.log_kept_mass is not None:
    sampler = sampler + rollout.log_kept_mass  # the scorer knows no filters
  found = importance.mismatch(logp, sampler, mask)
  tokens = jnp.sum(mask, dtype=jnp.float32)
  return {('mismatch/abs_max' if k == 'max_abs' else f'mismatch/{k}'):
          ((v, tokens) if k == 'max_abs' else (v * tokens, tokens)) for k, v in found.items()}


def _split(tree, count: int):
  """[count * n, ...] -> [count, n, ...], rows of each piece over the data axes."""
  def cut(x):
    x = x.reshape(count, x.shape[0] // count, *x.shape[1:])
    return axes.constrain(x, None, 'batch', *(None,) * (x.ndim - 2))

  return jax.tree.map(cut, tree)


def make_gradient(config: ModelConfig, terms: Sequence[api.Term], s: StepSettings,
                  role_configs: dict[str, ModelConfig]):
  """gradient(params, parts, roles, first) -> (grads, metrics) of one mini-batch.

  `first` (bool[]) marks the mini-batch whose log-probs are still those of the sampler's weights.
  """

  def loss(params, parts, roles, dens, first):
    total, metrics = 0.0, {}
    frozen = {k: (role_configs[k], v) for k, v in roles.items()}
    for part in parts:
      out = model_outputs(config, params, part.rollout, frozen, s, part.group)
      for term, den in zip(terms, dens):
        num, _, found = term(out, part.signal)
        total += num / jnp.maximum(den, 1e-20)
        metrics = merge_metrics(metrics, found)
      seen = mismatch_metrics(jax.lax.stop_gradient(out.logp), part.rollout)
      metrics = merge_metrics(metrics, jax.tree.map(lambda x: jnp.where(first, x, 0.0), seen))
    return total, metrics

  def gradient(params, parts, roles, first):
    frozen = {k: (role_configs[k], v) for k, v in roles.items()}
    shapes = [jax.eval_shape(lambda p, r, g=p.group: model_outputs(config, p, r, frozen, s, g),
                             params, p.rollout) for p in parts]
    dens = denominators(terms, shapes, [p.signal for p in parts])
    grad = jax.grad(loss, has_aux=True)
    if s.micro_batches == 1:
      return grad(params, parts, roles, dens, first)
    pieces = _split(parts, s.micro_batches)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    blank = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(lambda q: grad(params, q, roles, dens, first)[1],
                     jax.tree.map(lambda x: x[0], pieces)))

    def body(carry, piece):
      grads, metrics = grad(params, piece, roles, dens, first)
      return (jax.tree.map(jnp.add, carry[0], grads), merge_metrics(carry[1], metrics)), None

    return jax.lax.scan(body, (zeros, blank), pieces)[0]

  return gradient


def make_train_step(config: ModelConfig, method: api.Method, optimizer, s: StepSettings,
                    role_configs: dict[str, ModelConfig] | None = None):
  """step(state, parts, roles) -> (state, metrics), to be jitted with the state donated.

  A mini-batch without active rows, or with a non-finite gradient, leaves parameters, optimiser and
  weight decay untouched; `nonfinite` counts the latter.
  """
  gradient = make_gradient(config, method.terms, s, role_configs or {})

  def minibatch(state: TrainState, parts, roles, first):
    grads, metrics = gradient(state.params, parts, roles, first)
    norm = optax.global_norm(grads)
    active = jnp.any(jnp.stack([jnp.any(p.signal.active) for p in parts]))
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    go = active & finite
    one = jnp.ones(())
    metrics = metrics | {
      'grad_norm': (jnp.where(finite, norm, 0.0), one), 'nonfinite_max': (~finite * one, one),
      'update/skipped_frac': (~active * one, one),
      'update/tokens': (sum(jnp.sum(p.signal.mask, dtype=jnp.float32) for p in parts), one)}
    return dataclasses.replace(
      state, params=trees.select(go, params, state.params),
      opt_state=trees.select(go, opt_state, state.opt_state),
      updates=state.updates + go, skipped=state.skipped + ~active), metrics

  def step(state: TrainState, parts: tuple[Part, ...], roles: dict[str, Any]):
    first = jnp.arange(method.iterations) == 0
    pieces = _split(parts, method.iterations)

    def body(state, scanned):
      return minibatch(state, scanned[0], roles, scanned[1])

    state, stacked = jax.lax.scan(body, state, (pieces, first))
    metrics = {k: ((jnp.max(a), b[0]) if k.endswith('_max') else (jnp.sum(a), jnp.sum(b)))
               for k, (a, b) in stacked.items()}
    metrics = finish_metrics(metrics) | {'param_norm': optax.global_norm(state.params)}
    return dataclasses.replace(state, version=state.version + 1), metrics

  return step
