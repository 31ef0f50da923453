"""Where every parameter stands in a published checkpoint: one row per tensor, for all families.

A row names tensors of one layer and the leaves of our block that they hold; `split` gives the
leaves as views of the tensors (no copy of a mapped file), `join` goes back. Tensors of linear maps
are [out, in] on disk and [in, ..., heads, size] here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from zppo_jax.models.config import ModelConfig, Slot

Views = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Row:
  """`names` hold {i} for the layer and {e} for the expert; `leaves` are paths in a Block."""

  names: tuple[str, ...]
  leaves: tuple[str, ...]
  split: Callable[..., Views]  # tensors -> leaves, of one layer (and one expert)
  join: Callable[..., Views]  # leaves -> tensors

  @property
  def per_expert(self) -> bool:
    return '{e}' in self.names[0]


def _concat(parts, axis: int = 0):
  lib = np if all(isinstance(p, np.ndarray) for p in parts) else jnp
  return lib.concatenate(parts, axis)


def same(name: str, leaf: str) -> Row:
  return Row((name,), (leaf,), lambda x: (x,), lambda x: (x,))


def linear(name: str, leaf: str) -> Row:
  """[out, in] <-> [in, out]."""
  return Row((name,), (leaf,), lambda x: (x.T,), lambda x: (x.T,))


def into_heads(name: str, leaf: str, size: int) -> Row:
  """[H size, in] <-> [in, H, size]."""
  return Row((name,), (leaf,), lambda x: (_heads(x, size),), lambda y: (_rows(y),))


def out_of_heads(name: str, leaf: str, size: int) -> Row:
  """[out, H size] <-> [H, size, out]."""
  return Row((name,), (leaf,),
             lambda x: (x.reshape(x.shape[0], -1, size).transpose(1, 2, 0),),
             lambda y: (y.transpose(2, 0, 1).reshape(y.shape[2], -1),))


def _heads(x, size: int):
  return x.reshape(-1, size, x.shape[1]).transpose(2, 0, 1)


def _rows(y):
  """[in, H, size] -> [H size, in]."""
  return y.transpose(1, 2, 0).reshape(-1, y.shape[0])


def _attention(c: ModelConfig) -> list[Row]:
  at, size = 'layers.{i}.self_attn.', c.head_dim
  query = into_heads(at + 'q_proj.weight', 'mixer.query', size)
  if c.attn_gate:  # per head the query, then its gate
    def split(x):
      both = x.reshape(-1, 2, size, x.shape[1]).transpose(1, 3, 0, 2)
      return both[0], both[1]

    query = Row((at + 'q_proj.weight',), ('mixer.query', 'mixer.gate'), split,
                lambda q, g: (_rows(_concat([q, g], 2)),))
  rows = [query, into_heads(at + 'k_proj.weight', 'mixer.key', size),
          into_heads(at + 'v_proj.weight', 'mixer.value', size),
          out_of_heads(at + 'o_proj.weight', 'mixer.out', size)]
  if c.qk_norm:
    rows += [same(at + 'q_norm.weight', 'mixer.query_norm'),
             same(at + 'k_norm.weight', 'mixer.key_norm')]
  return rows


def _mla(c: ModelConfig) -> list[Row]:
  at, m = 'layers.{i}.self_attn.', c.mla
  size = m.nope + m.rope
  if m.query_rank:
    query = [linear(at + 'q_a_proj.weight', 'mixer.query.0'),
             same(at + 'q_a_layernorm.weight', 'mixer.query.1'),
             into_heads(at + 'q_b_proj.weight', 'mixer.query.2', size)]
  else:
    query = [into_heads(at + 'q_proj.weight', 'mixer.query', size)]

  def split(x):
    both = _heads(x, m.nope + m.value)
    return both[..., :m.nope], both[..., m.nope:]

  up = Row((at + 'kv_b_proj.weight',), ('mixer.key', 'mixer.value'), split,
           lambda k, v: (_rows(_concat([k, v], 2)),))
  return [*query, linear(at + 'kv_a_proj_with_mqa.weight', 'mixer.latent'),
          same(at + 'kv_a_layernorm.weight', 'mixer.latent_norm'), up,
          out_of_heads(at + 'o_proj.weight', 'mixer.out', m.value)]


def _gdn(c: ModelConfig) -> list[Row]:
  at = 'layers.{i}.linear_attn.'
  inputs = _grouped_inputs(c, at) if c.family == 'qwen3_next' else _flat_inputs(c, at)
  return [*inputs,
          Row((at + 'conv1d.weight',), ('mixer.conv',), lambda x: (x[:, 0],),
              lambda y: (y[:, None],)),
          same(at + 'A_log', 'mixer.decay_scale'), same(at + 'dt_bias', 'mixer.decay_bias'),
          same(at + 'norm.weight', 'mixer.norm'),
          out_of_heads(at + 'out_proj.weight', 'mixer.out', c.linear_value_dim)]


def _flat_inputs(c: ModelConfig, at: str) -> list[Row]:
  keys = c.linear_heads * c.linear_key_dim

  def split(x):
    return (_heads(x[:keys], c.linear_key_dim), _heads(x[keys:2 * keys], c.linear_key_dim),
            _heads(x[2 * keys:], c.linear_value_dim))

  return [Row((at + 'in_proj_qkv.weight',), ('mixer.query', 'mixer.key', 'mixer.value'), split,
              lambda q, k, v: (_concat([_rows(q), _rows(k), _rows(v)]),)),
          into_heads(at + 'in_proj_z.weight', 'mixer.gate', c.linear_value_dim),
          linear(at + 'in_proj_b.weight', 'mixer.rate'),
          linear(at + 'in_proj_a.weight', 'mixer.decay')]


def _grouped_inputs(c: ModelConfig, at: str) -> list[Row]:
  """Qwen3-Next stores, for each key head: its q and k, then v and z of its value heads."""
  heads, group = c.linear_heads, c.linear_value_heads // c.linear_heads
  key, value = c.linear_key_dim, c.linear_value_dim

  def split(x):
    x = x.reshape(heads, -1, x.shape[1])
    parts = x[:, :key], x[:, key:2 * key], x[:, 2 * key:2 * key + group * value], (
      x[:, 2 * key + group * value:])
    return tuple(_group_heads(p, s) for p, s in zip(parts, (key, key, value, value)))

  def join(*leaves):
    parts = [y.transpose(1, 2, 0).reshape(heads, -1, y.shape[0]) for y in leaves]
    both = _concat(parts, 1)
    return (both.reshape(-1, both.shape[2]),)

  def split_rates(x):
    x = x.reshape(heads, 2, group, -1)
    return tuple(x[:, n].reshape(-1, x.shape[3]).T for n in (0, 1))

  def join_rates(b, a):
    parts = [y.T.reshape(heads, 1, group, -1) for y in (b, a)]
    return (_concat(parts, 1).reshape(-1, b.shape[0]),)

  leaves = 'mixer.query', 'mixer.key', 'mixer.value', 'mixer.gate'
  return [Row((at + 'in_proj_qkvz.weight',), leaves, split, join),
          Row((at + 'in_proj_ba.weight',), ('mixer.rate', 'mixer.decay'), split_rates, join_rates)]


def _group_heads(x, size: int):
  """[G, R size, in] -> [in, G R, size]."""
  return x.reshape(-1, size, x.shape[2]).transpose(2, 0, 1)


def _kda(c: ModelConfig) -> list[Row]:
  at, size = 'layers.{i}.self_attn.', c.linear_key_dim
  third = c.linear_heads * size

  def split_conv(q, k, v):
    return (_concat([x[:, 0] for x in (q, k, v)]),)

  def join_conv(y):
    return tuple(x[:, None] for x in (y[:third], y[third:2 * third], y[2 * third:]))

  return [into_heads(at + f'{n}_proj.weight', f'mixer.{leaf}', size)
          for n, leaf in (('q', 'query'), ('k', 'key'), ('v', 'value'))] + [
    Row(tuple(at + f'{n}_conv1d.weight' for n in 'qkv'), ('mixer.conv',), split_conv, join_conv),
    linear(at + 'f_a_proj.weight', 'mixer.decay.0'),
    into_heads(at + 'f_b_proj.weight', 'mixer.decay.1', size),
    Row((at + 'dt_bias',), ('mixer.decay_bias',), lambda x: (x.reshape(-1, size),),
        lambda y: (y.reshape(-1),)),
    Row((at + 'A_log',), ('mixer.decay_scale',), lambda x: (x.reshape(-1),),
        lambda y: (y.reshape(1, 1, -1, 1),)),
    linear(at + 'b_proj.weight', 'mixer.rate'), linear(at + 'g_a_proj.weight', 'mixer.gate.0'),
    into_heads(at + 'g_b_proj.weight', 'mixer.gate.1', size),
    same(at + 'o_norm.weight', 'mixer.norm'),
    out_of_heads(at + 'o_proj.weight', 'mixer.out', size)]


def _dense(at: str, leaf: str) -> list[Row]:
  return [linear(f'{at}{n}_proj.weight', f'{leaf}.{n}') for n in ('gate', 'up', 'down')]


def _moe(c: ModelConfig, fused: bool) -> list[Row]:
  kimi = c.family == 'kimi_linear'
  at = 'layers.{i}.block_sparse_moe.' if kimi else 'layers.{i}.mlp.'
  rows = [linear(at + 'gate.weight', 'mlp.router')]
  if c.moe.bias:
    rows.append(same(at + 'gate.e_score_correction_bias', 'mlp.bias'))
  if fused:
    rows += _fused_experts(c, at)
  else:
    names = ('w1', 'w3', 'w2') if kimi else ('gate_proj', 'up_proj', 'down_proj')
    rows += [linear(at + 'experts.{e}.' + n + '.weight', f'mlp.{leaf}')
             for n, leaf in zip(names, ('gate', 'up', 'down'))]
  if c.moe.shared:
    gated = c.moe.shared_gate
    rows += _dense(at + ('shared_expert.' if gated else 'shared_experts.'), 'mlp.shared')
    if gated:
      rows.append(linear(at + 'shared_expert_gate.weight', 'mlp.shared_gate'))
  return rows


def _fused_experts(c: ModelConfig, at: str) -> list[Row]:
  inter = c.moe.inter

  def split(x):
    return x[:, :inter].transpose(0, 2, 1), x[:, inter:].transpose(0, 2, 1)

  return [Row((at + 'experts.gate_up_proj',), ('mlp.gate', 'mlp.up'), split,
              lambda g, u: (_concat([g, u], 2).transpose(0, 2, 1),)),
          Row((at + 'experts.down_proj',), ('mlp.down',), lambda x: (x.transpose(0, 2, 1),),
              lambda y: (y.transpose(0, 2, 1),))]


MIXERS = {'full': _attention, 'sliding': _attention, 'mla': _mla, 'gdn': _gdn, 'kda': _kda}


def block_rows(c: ModelConfig, slot: Slot, fused: bool) -> list[Row]:
  """Rows of a layer; `fused`: the experts of a layer stand in one tensor."""
  at = 'layers.{i}.'
  norms = {'input_layernorm': 'mixer_norm', 'post_attention_layernorm': 'mlp_norm'}
  if c.sandwich:
    norms = {'input_layernorm': 'mixer_norm', 'post_attention_layernorm': 'mixer_post_norm',
             'pre_feedforward_layernorm': 'mlp_norm', 'post_feedforward_layernorm': 'mlp_post_norm'}
  rows = [same(f'{at}{name}.weight', leaf) for name, leaf in norms.items()]
  if slot.mixer not in MIXERS:
    raise ValueError(f'mixers: {slot.mixer!r} has no published tensors, only {sorted(MIXERS)} have')
  rows += MIXERS[slot.mixer](c)
  return rows + (_moe(c, fused) if slot.mlp == 'moe' else _dense(at + 'mlp.', 'mlp'))


def top_rows(c: ModelConfig) -> list[Row]:
  """Rows outside the layers; the head stands beside the prefix, not under it."""
  return [same('embed_tokens.weight', 'embed'), same('norm.weight', 'final_norm')]


HEAD = linear('lm_head.weight', 'head')
