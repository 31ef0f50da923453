"""A `config.json` for a model of ours, in the words of transformers 5.23."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zppo_jax.core.errors import UserError
from zppo_jax.models.config import ModelConfig

CLASSES = {
  'qwen3': 'Qwen3ForCausalLM', 'qwen3_moe': 'Qwen3MoeForCausalLM',
  'qwen3_next': 'Qwen3NextForCausalLM', 'qwen3_5_text': 'Qwen3_5ForCausalLM',
  'qwen3_5_moe_text': 'Qwen3_5MoeForCausalLM', 'llama': 'LlamaForCausalLM',
  'gemma2': 'Gemma2ForCausalLM', 'glm4_moe_lite': 'Glm4MoeLiteForCausalLM',
  'kimi_linear': 'KimiLinearForCausalLM'}
_TYPES = {'gdn': 'linear_attention', 'kda': 'linear_attention', 'full': 'full_attention',
          'mla': 'full_attention', 'sliding': 'sliding_attention'}


def text_family(config: ModelConfig) -> str:
  """model_type under which a text model is saved: its own, or that of the choices it makes.

  Raises UserError when no published architecture makes them.
  """
  if config.family:
    text = f'{config.family}_text'
    return text if text in CLASSES else config.family
  for name in CLASSES:
    wanted = to_json_fields(name, config)
    if wanted is not None and _read_back(name, wanted, config):
      return name
  raise UserError('model: no published architecture makes the choices of this config, so it has no '
                  'config.json; its weights are in the checkpoints of its run')


def _read_back(name: str, wanted: dict[str, Any], config: ModelConfig) -> bool:
  """Whether the family reads what was written as the same mathematics."""
  from zppo_jax.models import hf_config

  try:
    found = hf_config.from_json(wanted | {'model_type': name})
  except UserError:
    return False
  skip = {*hf_config.NOT_WEIGHTS, 'family', 'mixers', 'mlps', 'window'}
  same = all(getattr(found, f) == getattr(config, f) for f in vars(config) if f not in skip)
  return same and found.kinds == config.kinds


def to_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
  """The config.json of a text model, `config.family` being one of CLASSES."""
  fields = to_json_fields(config.family, config)
  if fields is None:
    raise UserError(f'model: {config.family} cannot say what this config chooses')
  return dict(architectures=[CLASSES[config.family]], model_type=config.family, dtype=dtype,
              transformers_version='5.23.0') | fields


def to_json_fields(family: str, c: ModelConfig) -> dict[str, Any] | None:
  """Fields of a family, None where the config lacks what they describe."""
  if family == 'gemma2' and c.attn_scale is None:
    return None
  if ('mla' in c.mixers) != (family in ('glm4_moe_lite', 'kimi_linear')):
    return None
  if ('moe' in c.mlps) != ('moe' in family or family in ('qwen3_next', 'kimi_linear')):
    return None
  common = dict(
    vocab_size=c.vocab, hidden_size=c.hidden, num_hidden_layers=c.layers,
    num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, intermediate_size=c.inter,
    rms_norm_eps=c.norm_eps, max_position_embeddings=c.context, tie_word_embeddings=c.tied,
    layer_types=[_TYPES.get(m, m) for m, _ in c.kinds], use_cache=True,
    bos_token_id=None, eos_token_id=None, pad_token_id=None)  # not the defaults of a family
  if family not in ('glm4_moe_lite', 'kimi_linear'):
    common['head_dim'] = c.head_dim
  if family != 'kimi_linear':
    common['rope_parameters'] = _rope(c)
  return common | _OWN[family](c)


def _rope(c: ModelConfig) -> dict[str, Any]:
  found: dict[str, Any] = dict(rope_type='default', rope_theta=c.rope_theta,
                               partial_rotary_factor=(c.rope_dim or c.head_dim) / c.head_dim)
  if c.rope is None:
    return found
  found |= dict(rope_type=c.rope.kind, factor=c.rope.factor)
  if c.rope.kind != 'linear':
    found['original_max_position_embeddings'] = c.rope.original
  if c.rope.kind == 'llama3':
    found |= dict(low_freq_factor=c.rope.low, high_freq_factor=c.rope.high)
  if c.rope.kind == 'yarn':
    found |= dict(beta_fast=c.rope.beta_fast, beta_slow=c.rope.beta_slow)
    if c.rope.attention is not None:
      found['attention_factor'] = c.rope.attention
  return found


def _qwen3(c: ModelConfig) -> dict[str, Any]:
  slides = 'sliding' in c.mixers
  return dict(hidden_act='silu', attention_bias=False, use_sliding_window=slides,
              sliding_window=c.window or None)


def _softmax_moe(c: ModelConfig) -> dict[str, Any]:
  found = dict(
    num_experts=c.moe.experts, num_experts_per_tok=c.moe.top_k, moe_intermediate_size=c.moe.inter,
    norm_topk_prob=c.moe.renormalise, decoder_sparse_step=1,
    mlp_only_layers=[i for i, (_, mlp) in enumerate(c.kinds) if mlp == 'dense'])
  return found | (dict(shared_expert_intermediate_size=c.moe.shared) if c.moe.shared else {})


def _hybrid(c: ModelConfig) -> dict[str, Any]:
  return dict(
    hidden_act='silu', attention_bias=False, linear_num_key_heads=c.linear_heads,
    linear_num_value_heads=c.linear_value_heads, linear_key_head_dim=c.linear_key_dim,
    linear_value_head_dim=c.linear_value_dim, linear_conv_kernel_dim=c.linear_conv)


def _text_hybrid(c: ModelConfig) -> dict[str, Any]:
  """Qwen3.5, whose positions have three axes; text moves along all of them at once."""
  half = (c.rope_dim or c.head_dim) // 2
  third = [half - 2 * (half // 3), half // 3, half // 3]
  return _hybrid(c) | dict(rope_parameters=_rope(c) | dict(mrope_section=third))


def _gemma2(c: ModelConfig) -> dict[str, Any]:
  return dict(hidden_activation='gelu_pytorch_tanh', attention_bias=False,
              query_pre_attn_scalar=round(c.attn_scale**-2), attn_logit_softcapping=c.attn_cap,
              final_logit_softcapping=c.logit_cap, sliding_window=c.window or 4096)


def _latent(c: ModelConfig) -> dict[str, Any]:
  return dict(
    hidden_act='silu', attention_bias=False, kv_lora_rank=c.mla.rank,
    q_lora_rank=c.mla.query_rank or None, qk_nope_head_dim=c.mla.nope, qk_rope_head_dim=c.mla.rope,
    v_head_dim=c.mla.value, mlp_layer_types=['sparse' if m == 'moe' else 'dense'
                                             for _, m in c.kinds],
    num_experts_per_tok=c.moe.top_k, moe_intermediate_size=c.moe.inter,
    routed_scaling_factor=c.moe.scale, topk_group=c.moe.top_groups)


def _glm(c: ModelConfig) -> dict[str, Any]:
  found = _latent(c) | dict(
    n_routed_experts=c.moe.experts, n_shared_experts=c.moe.shared // c.moe.inter,
    n_group=c.moe.groups, norm_topk_prob=c.moe.renormalise,
    rope_interleave=c.mla.pairs == 'interleaved')
  return found | dict(layer_types=None)


def _kimi(c: ModelConfig) -> dict[str, Any]:
  full = [i + 1 for i, (mixer, _) in enumerate(c.kinds) if mixer == 'mla']
  return _latent(c) | dict(
    num_experts=c.moe.experts, num_shared_experts=c.moe.shared // c.moe.inter,
    num_expert_group=c.moe.groups, moe_renormalize=c.moe.renormalise,
    num_experts_per_token=c.moe.top_k,
    first_k_dense_replace=sum(m == 'dense' for _, m in c.kinds), model_max_length=c.context,
    linear_attn_config=dict(
      num_heads=c.linear_heads, head_dim=c.linear_key_dim, short_conv_kernel_size=c.linear_conv,
      full_attn_layers=full, kda_layers=[i + 1 for i in range(c.layers) if i + 1 not in full]))


_OWN: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
  'qwen3': _qwen3, 'qwen3_moe': lambda c: _qwen3(c) | _softmax_moe(c),
  'qwen3_next': lambda c: _hybrid(c) | _softmax_moe(c), 'qwen3_5_text': _text_hybrid,
  'qwen3_5_moe_text': lambda c: _text_hybrid(c) | _softmax_moe(c),
  'llama': lambda c: dict(hidden_act='silu', attention_bias=False, mlp_bias=False),
  'gemma2': _gemma2, 'glm4_moe_lite': _glm, 'kimi_linear': _kimi}
