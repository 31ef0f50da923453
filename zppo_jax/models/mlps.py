"""Channel mixers: a gated MLP, or a mixture of them; apply(config, params, x) -> y."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from zppo_jax.mesh import axes
from zppo_jax.models import layers
from zppo_jax.models.config import ModelConfig, Moe

Array = jax.Array


def dense(config: ModelConfig, params, x: Array) -> Array:
  return layers.gated_mlp(config.act, x, params.gate, params.up, params.down)


def moe(config: ModelConfig, params, x: Array) -> Array:
  """Sum of the chosen experts, weighed by the router, plus the shared one; x [B, T, D].

  No token is dropped. Shards of the `expert` and `tensor` axes compute what their experts (and
  features) add to the tokens that they hold, and sum.
  """
  chosen, weights = route(config.moe, params.router, params.bias, x)
  y = _sharded_experts(config, params, x, chosen, weights)
  if params.shared is None:
    return y
  shared = dense(config, params.shared, x)
  if params.shared_gate is not None:
    shared = shared * jax.nn.sigmoid(layers.project(x, params.shared_gate))
  return y + shared


MLPS = {'dense': dense, 'moe': moe}


def route(m: Moe, router: Array, bias: Array | None, x: Array) -> tuple[Array, Array]:
  """(ids i32[B, T, top_k], weights f32[B, T, top_k]) of the experts of every token.

  softmax: probabilities over all experts, logits in the dtype of x. sigmoid: scores in float32,
  chosen by score + bias, best groups first, and weighed without the bias. arXiv 2412.19437.
  """
  if m.score == 'softmax':
    scores = jax.nn.softmax(layers.project(x, router).astype(jnp.float32), axis=-1)
  else:
    scores = jax.nn.sigmoid(layers.project(x.astype(jnp.float32), router))
  ranked = scores if bias is None else scores + lax.stop_gradient(bias)
  if m.groups > 1:
    ranked = _best_groups(m, ranked)
  _, chosen = lax.top_k(lax.stop_gradient(ranked), m.top_k)
  weights = jnp.take_along_axis(scores, chosen, axis=-1)
  if m.renormalise:
    weights = weights / (jnp.sum(weights, -1, keepdims=True) + 1e-20)
  return chosen, weights * m.scale


def _best_groups(m: Moe, ranked: Array) -> Array:
  """-inf outside the top_groups groups with the highest sums of their two best scores."""
  grouped = ranked.reshape(*ranked.shape[:-1], m.groups, -1)
  best = jnp.sum(lax.top_k(grouped, min(2, grouped.shape[-1]))[0], -1)
  _, kept = lax.top_k(best, m.top_groups)
  inside = jnp.any(jax.nn.one_hot(kept, m.groups, dtype=bool), axis=-2)
  return jnp.where(inside[..., None], grouped, -jnp.inf).reshape(ranked.shape)


def _experts(act: str, count: int, x: Array, chosen: Array, weights: Array, gate: Array, up: Array,
             down: Array, first) -> Array:
  """What experts first.. first + count - 1 add to x [B, T, D]; rows are sorted by expert."""
  top_k, flat = chosen.shape[-1], x.reshape(-1, x.shape[-1])
  local = chosen.reshape(-1) - first
  here = (local >= 0) & (local < count)
  order = jnp.argsort(jnp.where(here, local, count), stable=True)
  sizes = jnp.bincount(jnp.where(here, local, count), length=count + 1)[:count].astype(jnp.int32)
  rows = flat[order // top_k]
  product = functools.partial(lax.ragged_dot, group_sizes=sizes)
  wide = layers.ACTIVATIONS[act](product(rows, gate)) * product(rows, up)
  out = product(wide.astype(x.dtype), down)
  kept = jnp.where(here[order], weights.reshape(-1)[order], 0)[:, None]
  out = jnp.where(kept != 0, out, 0) * kept.astype(out.dtype)
  return out[jnp.argsort(order)].reshape(*x.shape[:-1], top_k, -1).sum(-2).astype(x.dtype)


def _sharded_experts(config: ModelConfig, params, x: Array, chosen: Array, weights: Array) -> Array:
  matrices = [w.astype(x.dtype) for w in (params.gate, params.up, params.down)]
  count, mesh = config.moe.experts, jax.sharding.get_abstract_mesh()
  weights = weights.astype(x.dtype if config.moe.score == 'softmax' else jnp.float32)
  if mesh.empty or mesh.size == 1:
    return _experts(config.act, count, x, chosen, weights, *matrices, 0)
  names = ('experts', None, 'mlp'), ('experts', None, 'mlp'), ('experts', 'mlp', None)
  specs = [axes.fit(n, w.shape, mesh) for n, w in zip(names, matrices)]
  rows = axes.fit(('batch', 'length', None), x.shape, mesh)
  split = mesh.shape['expert'] if specs[0][0] else 1
  summed = tuple(a for a in (specs[0][0], specs[0][2]) if a)

  def shard(x, chosen, weights, *matrices):
    first = lax.axis_index('expert') * (count // split) if split > 1 else 0
    out = _experts(config.act, count // split, x, chosen, weights, *matrices, first)
    return lax.psum(out, summed) if summed else out

  return jax.shard_map(shard, in_specs=(rows, rows, rows, *specs), out_specs=rows,
                       check_vma=False)(x, chosen, weights, *matrices)
