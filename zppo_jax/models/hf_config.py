"""Architectures by their published `config.json`: read into a ModelConfig, and written from one.

Absent keys take the defaults of transformers 5.23; a value that would change the mathematics in a
way that we do not have is refused by name, all of them at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from zppo_jax.core.errors import UserError
from zppo_jax.models.config import Mla, ModelConfig, Moe, Rope, problems

Json = Mapping[str, Any]
# Fields of ModelConfig that no config.json decides.
NOT_WEIGHTS = ('remat', 'unroll', 'query_chunk', 'dtype', 'param_dtype', 'num_valid',
               'linear_kernel', 'attn_kernel', 'context')
_LINEAR = {'linear_attention': 'gdn', 'full_attention': 'full', 'sliding_attention': 'sliding'}


def read(path: str) -> ModelConfig:
  """ModelConfig of a checkpoint folder. Raises UserError on what is missing or not supported."""
  file = os.path.join(path, 'config.json')
  if not os.path.exists(file):
    raise UserError(f'model: {path!r} has no config.json')
  with open(file, encoding='utf-8') as f:
    return from_json(json.load(f), path)


def stored_dtype(path: str) -> str:
  """dtype that a checkpoint folder says it has, float32 when it says nothing."""
  with open(os.path.join(path, 'config.json'), encoding='utf-8') as f:
    given = json.load(f)
  for part in (given, given.get('text_config', {})):
    for name in ('dtype', 'torch_dtype'):
      if part.get(name):
        return part[name]
  return 'float32'


def from_json(given: Json, where: str = 'config.json') -> ModelConfig:
  """ModelConfig of the contents of a config.json. Raises UserError listing all that is wrong."""
  kind = given.get('model_type')
  text = given.get('text_config', given)
  if kind not in FAMILIES:
    raise UserError(f'model: model_type {kind!r} of {where} is not one of {sorted(FAMILIES)}')
  faults = _unsupported(kind, text)
  if 'quantization_config' in given:
    faults.append('quantization_config: quantised checkpoints are not supported')
  config = None
  try:
    fields = FAMILIES[kind](text) | dict(family=kind)
    default = kind == 'gemma2'
    config = ModelConfig(**_common(text, kind) | fields,
                         tied=bool(given.get('tie_word_embeddings', default)))
  except KeyError as missing:
    faults.append(f'{missing.args[0]}: missing')
  except ValueError as error:
    faults.append(str(error))
  if config is not None:
    faults += problems(config)
  if faults:
    raise UserError(f'model: {where} ({kind}): ' + '; '.join(faults))
  return config


def _first(given: Json, *names: str, default: Any = KeyError) -> Any:
  """Value of the first name that is there and not null."""
  for name in names:
    if given.get(name) is not None:
      return given[name]
  if default is KeyError:
    raise KeyError(names[0])
  return default


def _unsupported(kind: str, c: Json) -> list[str]:
  expected = {'attention_bias': False, 'mlp_bias': False, 'attn_output_gate': True}
  if kind == 'gemma2':
    expected['hidden_activation'] = 'gelu_pytorch_tanh'
  else:
    expected['hidden_act'] = 'silu'
  if kind == 'kimi_linear':
    expected |= {'mla_use_nope': True, 'moe_router_activation_func': 'sigmoid'}
  return [f'{name}: {c[name]!r} is not supported, only {value!r}' for name, value in
          expected.items() if c.get(name) is not None and c[name] != value]


def _common(c: Json, kind: str) -> dict[str, Any]:
  heads = _first(c, 'num_attention_heads')
  hidden = _first(c, 'hidden_size')
  sizes = {'llama': hidden // heads, 'gemma2': 256, 'qwen3_next': 256, 'qwen3_5': 256,
           'qwen3_5_text': 256, 'qwen3_5_moe': 256, 'qwen3_5_moe_text': 256}
  return dict(
    vocab=_first(c, 'vocab_size'), hidden=hidden, layers=_first(c, 'num_hidden_layers'),
    heads=heads, kv_heads=_first(c, 'num_key_value_heads', default=heads),
    head_dim=_first(c, 'head_dim', default=sizes.get(kind, 128)),
    inter=_first(c, 'intermediate_size', default=1),
    norm_eps=_first(c, 'rms_norm_eps', default=1e-5 if kind in ('glm4_moe_lite', 'kimi_linear')
                    else 1e-6),
    context=_first(c, 'max_position_embeddings', 'model_max_length', default=32768))


def _rope(c: Json, partial: float = 1.0) -> dict[str, Any]:
  """Fields of the rotary positions: a value inside the record wins over one beside it."""
  old = c.get('rope_scaling') or {}
  r = {k: c[k] for k in ('rope_theta', 'partial_rotary_factor') if c.get(k) is not None}
  r |= old | (c.get('rope_parameters') or {})
  kind = r.get('rope_type', r.get('type', 'default'))
  share = r.get('partial_rotary_factor', partial)
  found = dict(rope_theta=float(_first(r, 'rope_theta')))
  if share != 1.0:
    found['rope_dim'] = int(_first(c, 'head_dim', default=256) * share)
  if kind in ('default', 'mrope'):
    return found
  if kind not in ('linear', 'llama3', 'yarn'):
    raise ValueError(f'rope_type: {kind!r} is not one of default, linear, llama3, yarn')
  scaling = dict(kind=kind, factor=float(_first(r, 'factor')))
  if kind != 'linear':
    scaling['original'] = int(_first(r, 'original_max_position_embeddings', default=_first(
      c, 'max_position_embeddings', default=0)))
  if kind == 'llama3':
    scaling |= dict(low=float(_first(r, 'low_freq_factor')),
                    high=float(_first(r, 'high_freq_factor')))
  if kind == 'yarn':
    scaling |= dict(beta_fast=float(_first(r, 'beta_fast', default=32.0)),
                    beta_slow=float(_first(r, 'beta_slow', default=1.0)),
                    attention=_first(r, 'attention_factor', default=None))
    all_dim = _first(r, 'mscale_all_dim', default=0.0)
    if all_dim:
      scaling['scores'] = (0.1 * all_dim * math.log(scaling['factor']) + 1.0) ** 2
  return found | dict(rope=Rope(**scaling))


def _kinds(c: Json, names: Mapping[str, str], default: Callable[[int], str]) -> tuple[str, ...]:
  """Mixer of every layer, by `layer_types` or a default by index."""
  count = _first(c, 'num_hidden_layers')
  given = c.get('layer_types')
  if given is None:
    return tuple(default(i) for i in range(count))
  if len(given) != count:
    raise ValueError(f'layer_types: {len(given)} entries for {count} layers')
  unknown = sorted(set(given) - set(names))
  if unknown:
    raise ValueError(f'layer_types: unknown {unknown}, known {sorted(names)}')
  return tuple(names[k] for k in given)


def _sparse(c: Json) -> tuple[str, ...]:
  """Which layers are mixtures, by the Qwen keys."""
  step, alone = c.get('decoder_sparse_step', 1), c.get('mlp_only_layers') or ()
  return tuple('dense' if i in alone or (i + 1) % step else 'moe'
               for i in range(_first(c, 'num_hidden_layers')))


def _sigmoid_moe(c: Json) -> dict[str, Any]:
  """The mixture of GLM and Kimi."""
  inter = _first(c, 'moe_intermediate_size')
  shared = _first(c, 'n_shared_experts', 'num_shared_experts', default=1)
  dense = _first(c, 'first_k_dense_replace', default=1)
  layers = _first(c, 'num_hidden_layers')
  given = c.get('mlp_layer_types') or ['dense' if i < dense else 'sparse' for i in range(layers)]
  return dict(
    mlps=tuple({'dense': 'dense', 'sparse': 'moe'}[k] for k in given),
    moe=Moe(experts=_first(c, 'n_routed_experts', 'num_experts', 'num_local_experts'),
            top_k=_first(c, 'num_experts_per_token', 'num_experts_per_tok'), inter=inter,
            score='sigmoid', bias=True, shared=inter * shared,
            renormalise=_first(c, 'moe_renormalize', 'norm_topk_prob', default=True),
            scale=float(_first(c, 'routed_scaling_factor', default=1.0)),
            groups=_first(c, 'num_expert_group', 'n_group', default=1),
            top_groups=_first(c, 'topk_group', default=1)))


def _mla(c: Json, pairs: str) -> Mla:
  return Mla(rank=_first(c, 'kv_lora_rank'), nope=_first(c, 'qk_nope_head_dim'),
             rope=_first(c, 'qk_rope_head_dim'), value=_first(c, 'v_head_dim'),
             query_rank=_first(c, 'q_lora_rank', default=0), pairs=pairs)


def _qwen3(c: Json) -> dict[str, Any]:
  slides = c.get('use_sliding_window') or False
  first = _first(c, 'max_window_layers', default=28)
  kinds = _kinds(c, _LINEAR, lambda i: 'sliding' if slides and i >= first else 'full')
  return _rope(c) | dict(mixers=kinds, window=_first(c, 'sliding_window', default=0))


def _qwen3_moe(c: Json) -> dict[str, Any]:
  return _qwen3(c) | dict(mlps=_sparse(c), moe=Moe(
    experts=_first(c, 'num_experts', 'num_local_experts'), top_k=_first(c, 'num_experts_per_tok'),
    inter=_first(c, 'moe_intermediate_size'), renormalise=c.get('norm_topk_prob', False)))


def _hybrid(c: Json) -> dict[str, Any]:
  """Gated delta net with gated attention."""
  every = _first(c, 'full_attention_interval', default=4)
  return _rope(c, 0.25) | dict(
    norm='one_plus', attn_gate=True,
    mixers=_kinds(c, _LINEAR, lambda i: 'gdn' if (i + 1) % every else 'full'),
    linear_heads=_first(c, 'linear_num_key_heads', default=16),
    linear_value_heads=_first(c, 'linear_num_value_heads', default=32),
    linear_key_dim=_first(c, 'linear_key_head_dim', default=128),
    linear_value_dim=_first(c, 'linear_value_head_dim', default=128),
    linear_conv=_first(c, 'linear_conv_kernel_dim', default=4))


def _hybrid_moe(c: Json) -> dict[str, Any]:
  return _hybrid(c) | dict(mlps=_sparse(c), moe=Moe(
    experts=_first(c, 'num_experts', 'num_local_experts'), top_k=_first(c, 'num_experts_per_tok'),
    inter=_first(c, 'moe_intermediate_size'), renormalise=c.get('norm_topk_prob', True),
    shared=_first(c, 'shared_expert_intermediate_size'), shared_gate=True))


def _llama(c: Json) -> dict[str, Any]:
  return _rope(c) | dict(qk_norm=False)


def _gemma2(c: Json) -> dict[str, Any]:
  kinds = _kinds(c, _LINEAR, lambda i: 'full' if i % 2 else 'sliding')
  return _rope(c) | dict(
    norm='one_plus', sandwich=True, qk_norm=False, act='gelu_tanh', mixers=kinds,
    window=_first(c, 'sliding_window', default=4096), attn_cap=c.get('attn_logit_softcapping'),
    logit_cap=c.get('final_logit_softcapping'),
    attn_scale=_first(c, 'query_pre_attn_scalar', default=256) ** -0.5,
    embed_scale=_first(c, 'hidden_size') ** 0.5)


def _glm(c: Json) -> dict[str, Any]:
  pairs = 'interleaved' if c.get('rope_interleave', True) else 'half'
  size = _first(c, 'qk_nope_head_dim') + _first(c, 'qk_rope_head_dim')
  return _rope(c) | _sigmoid_moe(c) | dict(
    mixers=('mla',), mla=_mla(c, pairs), qk_norm=False, head_dim=size)


def _kimi(c: Json) -> dict[str, Any]:
  linear = c.get('linear_attn_config') or {}
  if c.get('layer_types') is None and not linear.get('full_attn_layers'):
    raise ValueError('layer_types: missing, and linear_attn_config has no full_attn_layers')
  full = set(linear.get('full_attn_layers') or ())  # counted from 1
  kinds = _kinds(c, {'linear_attention': 'kda', 'full_attention': 'mla'},
                 lambda i: 'mla' if i + 1 in full else 'kda')
  heads = _first(linear, 'num_heads', default=c.get('linear_num_heads'))
  size = _first(linear, 'head_dim', default=c.get('linear_head_dim'))
  mla = _mla(c, 'none')
  return _sigmoid_moe(c) | dict(
    mixers=kinds, mla=mla, qk_norm=False, head_dim=mla.nope + mla.rope, linear_heads=heads,
    linear_value_heads=heads, linear_key_dim=size, linear_value_dim=size,
    linear_conv=_first(linear, 'short_conv_kernel_size', default=_first(
      c, 'linear_conv_kernel_dim', default=4)))


FAMILIES: dict[str, Callable[[Json], dict[str, Any]]] = {
  'qwen3': _qwen3, 'qwen3_moe': _qwen3_moe, 'qwen3_next': _hybrid_moe, 'qwen3_5': _hybrid,
  'qwen3_5_text': _hybrid, 'qwen3_5_moe': _hybrid_moe, 'qwen3_5_moe_text': _hybrid_moe,
  'llama': _llama, 'gemma2': _gemma2, 'glm4_moe_lite': _glm, 'kimi_linear': _kimi}
