"""One abstract tree per model: shape, logical axes and initialiser of every parameter.

Initial values, shardings and checkpoint templates are all read off the same tree.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from zppo_jax.core import rng, trees, types
from zppo_jax.mesh import axes as axes_lib
from zppo_jax.models import config as config_lib
from zppo_jax.models import stages
from zppo_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Spec:
  """A parameter that does not exist yet. `scale` is the std of a normal, or None for ones; `draw`
  (key, shape) -> values stands above both."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  scale: float | None
  dtype: str
  draw: Callable | None = None


@types.record
class Attention:
  query: types.Array  # [D, H, K]
  key: types.Array  # [D, KV, K]
  value: types.Array  # [D, KV, K]
  out: types.Array  # [H, K, D]
  query_norm: types.Array | None  # [K]
  key_norm: types.Array | None  # [K]
  gate: types.Array | None  # [D, H, K], of what was read


@types.record
class Mla:
  """Attention through a latent of R features; N features without position, P with."""

  query: types.Array | tuple  # [D, H, N + P], or [D, Q], [Q] (norm), [Q, H, N + P]
  latent: types.Array  # [D, R + P]
  latent_norm: types.Array  # [R]
  key: types.Array  # [R, H, N]
  value: types.Array  # [R, H, V]
  out: types.Array  # [H, V, D]


@types.record
class Delta:
  """A delta-rule mixer; pairs are (down to a rank, up again). HV value heads, C channels."""

  query: types.Array  # [D, H, K]
  key: types.Array  # [D, H, K]
  value: types.Array  # [D, HV, V]
  conv: types.Array  # [C, W], of queries, keys and values side by side
  decay: types.Array | tuple  # [D, HV] for gdn, or [D, V], [V, HV, K]
  decay_scale: types.Array  # f32[HV], logarithm
  decay_bias: types.Array  # f32[HV] for gdn, or f32[HV, K]
  rate: types.Array | tuple  # [D, HV] for gdn and kda, or [D, R], [R, HV, K]
  value_rate: tuple | None  # [D, R], [R, HV, V] of fg2_gdn_plus
  gate: types.Array | tuple  # [D, HV, V] for gdn, or [D, V], [V, HV, V]
  norm: types.Array  # [V]
  out: types.Array  # [HV, V, D]


@types.record
class Mlp:
  gate: types.Array  # [D, F]
  up: types.Array  # [D, F]
  down: types.Array  # [F, D]


@types.record
class Moe:
  """E experts; tokens also take the shared one, weighed by a gate of their own if there is one."""

  router: types.Array  # [D, E]
  bias: types.Array | None  # f32[E], selects and does not weigh
  gate: types.Array  # [E, D, F]
  up: types.Array  # [E, D, F]
  down: types.Array  # [E, F, D]
  shared: Mlp | None
  shared_gate: types.Array | None  # [D, 1]


@types.record
class Block:
  mixer_norm: types.Array  # [D]
  mixer: Attention | Mla | Delta
  mlp_norm: types.Array  # [D]
  mlp: Mlp | Moe
  mixer_post_norm: types.Array | None = None  # [D]
  mlp_post_norm: types.Array | None = None  # [D]


@types.record
class Params:
  """A decoder. Leaves of a block have a leading axis of the repeats of its slot."""

  embed: types.Array  # [V, D]
  blocks: tuple[Block, ...]  # one per entry of config.slots
  final_norm: types.Array  # [D]
  head: types.Array | None  # [D, V]; None = tied to `embed`


def is_spec(x) -> bool:
  return isinstance(x, Spec)


def _attention(c: ModelConfig) -> Attention:
  wide, out = c.hidden**-0.5, (c.heads * c.head_dim * 2 * c.layers) ** -0.5
  norm = _norm(c, c.head_dim, 'head_dim') if c.qk_norm else None
  kv = Spec((c.hidden, c.kv_heads, c.head_dim), ('embed', 'kv_heads', 'head_dim'), wide,
            c.param_dtype)
  query = Spec((c.hidden, c.heads, c.head_dim), ('embed', 'heads', 'head_dim'), wide,
               c.param_dtype)
  return Attention(
    query=query, key=kv, value=kv, gate=query if c.attn_gate else None,
    out=Spec((c.heads, c.head_dim, c.hidden), ('heads', 'head_dim', 'embed'), out, c.param_dtype),
    query_norm=norm, key_norm=norm)


def _mla(c: ModelConfig) -> Mla:
  m, heads = c.mla, ('heads', 'head_dim')

  def spec(*shape, axes):
    return Spec(shape, axes, shape[0]**-0.5, c.param_dtype)

  def norm(size):  # of the weight kind in every family
    return Spec((size,), ('features',), None, 'float32')

  size = m.nope + m.rope
  query = spec(c.hidden, c.heads, size, axes=('embed', *heads))
  if m.query_rank:
    query = (spec(c.hidden, m.query_rank, axes=('embed', None)), norm(m.query_rank),
             spec(m.query_rank, c.heads, size, axes=(None, *heads)))
  return Mla(
    query=query, latent=spec(c.hidden, m.rank + m.rope, axes=('embed', None)),
    latent_norm=norm(m.rank), key=spec(m.rank, c.heads, m.nope, axes=(None, *heads)),
    value=spec(m.rank, c.heads, m.value, axes=(None, *heads)),
    out=Spec((c.heads, m.value, c.hidden), (*heads, 'embed'),
             (c.heads * m.value * 2 * c.layers) ** -0.5, c.param_dtype))


def _mlp(c: ModelConfig, inter: int = 0) -> Mlp:
  inter = inter or c.inter
  wide = Spec((c.hidden, inter), ('embed', 'mlp'), c.hidden**-0.5, c.param_dtype)
  down = Spec((inter, c.hidden), ('mlp', 'embed'), (inter * 2 * c.layers) ** -0.5, c.param_dtype)
  return Mlp(gate=wide, up=wide, down=down)


def _moe(c: ModelConfig) -> Moe:
  m = c.moe
  wide = Spec((m.experts, c.hidden, m.inter), ('experts', 'embed', 'mlp'), c.hidden**-0.5,
              c.param_dtype)
  down = Spec((m.experts, m.inter, c.hidden), ('experts', 'mlp', 'embed'),
              (m.inter * 2 * c.layers) ** -0.5, c.param_dtype)
  return Moe(
    router=Spec((c.hidden, m.experts), ('embed', None), c.hidden**-0.5, 'float32'),
    bias=Spec((m.experts,), (None,), 0.0, 'float32') if m.bias else None,
    gate=wide, up=wide, down=down, shared=_mlp(c, m.shared) if m.shared else None,
    shared_gate=(Spec((c.hidden, 1), ('embed', None), c.hidden**-0.5, c.param_dtype)
                 if m.shared_gate else None))


def _norm(c: ModelConfig, size: int, axis: str = 'features') -> Spec:
  """Weight of a norm: ones, or zeros where it is an offset from 1."""
  return Spec((size,), (axis,), 0.0 if c.norm == 'one_plus' else None, 'float32')


def _log_uniform(key, shape):
  """Logarithm of uniform (1, 16)."""
  return jnp.log(jax.random.uniform(key, shape, minval=1., maxval=16.))


def _time_step(key, shape):
  """Inverse softplus of a step that is log-uniform in (1e-3, 1e-1)."""
  step = jnp.exp(jax.random.uniform(key, shape, minval=math.log(1e-3), maxval=math.log(1e-1)))
  return step + jnp.log(-jnp.expm1(-step))


def _delta(kind: str, c: ModelConfig) -> Delta:
  heads, k, v = c.linear_value_heads, c.linear_key_dim, c.linear_value_dim
  wide = c.hidden**-0.5

  def direct(*shape, axes):
    return Spec((c.hidden, *shape), ('embed', *axes), wide, c.param_dtype)

  def low_rank(rank, size):
    return (Spec((c.hidden, rank), ('embed', None), wide, c.param_dtype),
            Spec((rank, heads, size), (None, 'heads', 'head_dim'), rank**-0.5, c.param_dtype))

  per_head, channels = kind == 'gdn', 2 * c.linear_heads * k + heads * v
  bias = ((heads,), ('heads',)) if per_head else ((heads, k), ('heads', 'head_dim'))
  fine = kind in ('fg2_gdn', 'fg2_gdn_plus')
  rank, head = c.linear_rank or k, ('heads', 'head_dim')
  return Delta(
    query=direct(c.linear_heads, k, axes=head), key=direct(c.linear_heads, k, axes=head),
    value=direct(heads, v, axes=head),
    conv=Spec((channels, c.linear_conv), (None, None), c.linear_conv**-0.5, c.param_dtype),
    decay=direct(heads, axes=('heads',)) if per_head else low_rank(v, k),
    decay_scale=Spec((heads,), ('heads',), None, 'float32', _log_uniform),
    decay_bias=Spec(*bias, None, 'float32', _time_step),
    rate=low_rank(rank, k) if fine else direct(heads, axes=('heads',)),
    value_rate=low_rank(rank, v) if kind == 'fg2_gdn_plus' else None,
    gate=direct(heads, v, axes=head) if per_head else low_rank(v, v),
    norm=Spec((v,), ('head_dim',), None, 'float32'),
    out=Spec((heads, v, c.hidden), ('heads', 'head_dim', 'embed'),
             (heads * v * 2 * c.layers) ** -0.5, c.param_dtype))


MIXER_PARAMS = dict.fromkeys(config_lib.ATTENTION_KINDS, _attention) | {'mla': _mla} | {
  kind: functools.partial(_delta, kind) for kind in config_lib.DELTA_KINDS}
MLP_PARAMS = {'dense': _mlp, 'moe': _moe}


def abstract(config: ModelConfig) -> Params:
  """The tree of `Spec`s of a model. Raises ValueError listing everything wrong with the config."""
  found = config_lib.problems(config)
  unknown = sorted(set(config.mixers) - set(MIXER_PARAMS))
  if unknown:
    found.append(f'mixers: unknown {unknown}; known: {sorted(MIXER_PARAMS)}')
  if found:
    raise ValueError('model config: ' + '; '.join(found))
  norm = _norm(config, config.hidden)
  post = norm if config.sandwich else None

  def stacked(slot: stages.Slot) -> Block:
    block = Block(norm, MIXER_PARAMS[slot.mixer](config), norm, MLP_PARAMS[slot.mlp](config), post,
                  post)
    return jax.tree.map(lambda s: dataclasses.replace(
      s, shape=(slot.repeats, *s.shape), axes=('layers', *s.axes)), block, is_leaf=is_spec)

  blocks = tuple(stacked(slot) for slot in config.slots)
  table = Spec((config.vocab, config.hidden), ('vocab', 'embed'), config.hidden**-0.5,
               config.param_dtype)
  head = None if config.tied else Spec(
    (config.hidden, config.vocab), ('embed', 'vocab'), config.hidden**-0.5, config.param_dtype)
  return Params(table, blocks, norm, head)


def materialise(specs, key: jax.Array):
  """Draws every parameter of a tree of `Spec`s; the key of a leaf is its path, not its order."""

  def draw(path, spec: Spec):
    leaf_key = rng.fold(key, trees.path_name(path))
    if spec.draw is not None:
      return spec.draw(leaf_key, spec.shape).astype(spec.dtype)
    if spec.scale is None:
      return jnp.ones(spec.shape, spec.dtype)
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
