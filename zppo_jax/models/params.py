"""One abstract tree per model: shape, logical axes and initialiser of every parameter.

Initial values, shardings and checkpoint templates are all read off the same tree.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from zppo_jax.core import rng, trees, types
from zppo_jax.mesh import axes as axes_lib
from zppo_jax.models import config as config_lib
from zppo_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Spec:
  """A parameter that does not exist yet. `scale` is the std of a normal, or None for ones."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  scale: float | None
  dtype: str


@types.record
class Attention:
  query: types.Array  # [D, H, K]
  key: types.Array  # [D, KV, K]
  value: types.Array  # [D, KV, K]
  out: types.Array  # [H, K, D]
  query_norm: types.Array | None  # [K]
  key_norm: types.Array | None  # [K]


@types.record
class Mlp:
  gate: types.Array  # [D, F]
  up: types.Array  # [D, F]
  down: types.Array  # [F, D]


@types.record
class Block:
  mixer_norm: types.Array  # [D]
  mixer: Attention
  mlp_norm: types.Array  # [D]
  mlp: Mlp


@types.record
class Params:
  """A decoder. Every leaf of `blocks` has a leading axis of config.repeats."""

  embed: types.Array  # [V, D]
  blocks: tuple[Block, ...]  # one per entry of config.mixers
  final_norm: types.Array  # [D]
  head: types.Array | None  # [D, V]; None = tied to `embed`


def is_spec(x) -> bool:
  return isinstance(x, Spec)


def _attention(c: ModelConfig) -> Attention:
  wide, out = c.hidden**-0.5, (c.heads * c.head_dim * 2 * c.layers) ** -0.5
  norm = Spec((c.head_dim,), ('head_dim',), None, c.param_dtype) if c.qk_norm else None
  kv = Spec((c.hidden, c.kv_heads, c.head_dim), ('embed', 'kv_heads', 'head_dim'), wide,
            c.param_dtype)
  return Attention(
    query=Spec((c.hidden, c.heads, c.head_dim), ('embed', 'heads', 'head_dim'), wide,
               c.param_dtype),
    key=kv, value=kv,
    out=Spec((c.heads, c.head_dim, c.hidden), ('heads', 'head_dim', 'embed'), out, c.param_dtype),
    query_norm=norm, key_norm=norm)


def _mlp(c: ModelConfig) -> Mlp:
  wide = Spec((c.hidden, c.inter), ('embed', 'mlp'), c.hidden**-0.5, c.param_dtype)
  down = Spec((c.inter, c.hidden), ('mlp', 'embed'), (c.inter * 2 * c.layers) ** -0.5,
              c.param_dtype)
  return Mlp(gate=wide, up=wide, down=down)


MIXER_PARAMS = {'full': _attention}


def abstract(config: ModelConfig) -> Params:
  """The tree of `Spec`s of a model. Raises ValueError listing everything wrong with the config."""
  found = config_lib.problems(config)
  unknown = sorted(set(config.mixers) - set(MIXER_PARAMS))
  if unknown:
    found.append(f'mixers: unknown {unknown}; known: {sorted(MIXER_PARAMS)}')
  if found:
    raise ValueError('model config: ' + '; '.join(found))
  norm = Spec((config.hidden,), ('features',), None, config.param_dtype)

  def stack(spec: Spec) -> Spec:
    return dataclasses.replace(
      spec, shape=(config.repeats, *spec.shape), axes=('layers', *spec.axes))

  blocks = tuple(
    jax.tree.map(stack, Block(norm, MIXER_PARAMS[m](config), norm, _mlp(config)), is_leaf=is_spec)
    for m in config.mixers)
  table = Spec((config.vocab, config.hidden), ('vocab', 'embed'), config.hidden**-0.5,
               config.param_dtype)
  head = None if config.tied else Spec(
    (config.hidden, config.vocab), ('embed', 'vocab'), config.hidden**-0.5, config.param_dtype)
  return Params(table, blocks, norm, head)


def materialise(specs, key: jax.Array):
  """Draws every parameter of a tree of `Spec`s; the key of a leaf is its path, not its order."""

  def draw(path, spec: Spec):
    if spec.scale is None:
      return jnp.ones(spec.shape, spec.dtype)
    leaf_key = rng.fold(key, trees.path_name(path))
    return (jax.random.normal(leaf_key, spec.shape) * spec.scale).astype(spec.dtype)

  return jax.tree_util.tree_map_with_path(draw, specs, is_leaf=is_spec)


def init(config: ModelConfig, key: jax.Array) -> Params:
  """Random parameters: normal with std fan_in^-1/2, output maps divided by sqrt(2 layers)."""
  return materialise(abstract(config), key)


def shapes(specs):
  """Tree of jax.ShapeDtypeStruct, for compiling without arrays and for checkpoint templates."""
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs, is_leaf=is_spec)


def shardings(specs, mesh: Mesh):
  """Tree of NamedSharding by the axis table; a dim that its axes do not divide stays whole."""
  return jax.tree.map(lambda s: NamedSharding(mesh, axes_lib.fit(s.axes, s.shape, mesh)), specs,
                      is_leaf=is_spec)


def count(config: ModelConfig) -> int:
  """Number of parameters."""
  return sum(math.prod(s.shape) for s in jax.tree.leaves(abstract(config), is_leaf=is_spec))
