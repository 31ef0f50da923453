"""Makes the golden files: random small checkpoints of every family with the logits of transformers.

  pip install torch==2.13.0 transformers==5.23.0 && python tests/models/golden/make.py [NAME ...]

Weights are drawn wide enough that every term counts: linear maps by fan-in, norms and decays off
their defaults, the correction bias of routers not zero.
"""

import os
import shutil
import sys

import numpy as np
import torch
import transformers

FOLDER = os.path.dirname(os.path.abspath(__file__))
LENGTHS = (1, 2, 3, 5, 70)  # shorter than a convolution, and over several chunks
NEW = 20  # greedy tokens
COMMON = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, head_dim=16, intermediate_size=48, rms_norm_eps=1e-6,
              max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
              use_cache=True)
ROPE = dict(rope_theta=1e4, rope_type='default')
PARTIAL = ROPE | dict(partial_rotary_factor=0.25)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
              linear_value_head_dim=12, linear_conv_kernel_dim=4,
              layer_types=['linear_attention', 'full_attention', 'linear_attention'])
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20)
SHARED = EXPERTS | dict(shared_expert_intermediate_size=28)
MLA = dict(kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
           num_key_value_heads=4)
HEADLESS = {k: v for k, v in COMMON.items() if k != 'head_dim'}  # GLM takes it for the rope size
LLAMA3 = dict(rope_type='llama3', rope_theta=1e4, factor=4.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = dict(rope_type='yarn', rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
KIMI = dict(num_heads=3, head_dim=8, short_conv_kernel_size=4, kda_layers=[1, 3],
            full_attn_layers=[2])
VISION = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=24, out_hidden_size=32,
              num_position_embeddings=25, deepstack_visual_indexes=[])
MROPE = PARTIAL | dict(partial_rotary_factor=0.5, mrope_section=[2, 1, 1])

# name: (class prefix, fields of the config)
FAMILIES = {
  'qwen3': ('Qwen3', COMMON | dict(rope_parameters=ROPE, tie_word_embeddings=True)),
  'qwen3_sliding': ('Qwen3', COMMON | dict(
    rope_parameters=YARN, tie_word_embeddings=False, num_attention_heads=6, use_sliding_window=True,
    sliding_window=5, max_window_layers=1)),
  'qwen3_moe': ('Qwen3Moe', COMMON | EXPERTS | dict(
    rope_parameters=ROPE, norm_topk_prob=True, mlp_only_layers=[1], tie_word_embeddings=False)),
  'qwen3_next': ('Qwen3Next', COMMON | LINEAR | SHARED | dict(
    rope_parameters=PARTIAL, norm_topk_prob=True, tie_word_embeddings=False)),
  'qwen3_5': ('Qwen3_5', COMMON | LINEAR | dict(rope_parameters=MROPE, tie_word_embeddings=True)),
  'qwen3_5_moe': ('Qwen3_5Moe', COMMON | LINEAR | SHARED | dict(
    rope_parameters=MROPE, tie_word_embeddings=False)),
  'llama': ('Llama', COMMON | dict(rope_parameters=LLAMA3, hidden_size=30, num_attention_heads=5,
                                   num_key_value_heads=5, tie_word_embeddings=False)),
  'gemma2': ('Gemma2', COMMON | dict(
    rope_parameters=ROPE, query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
    final_logit_softcapping=3.0, sliding_window=5, hidden_activation='gelu_pytorch_tanh')),
  'glm4_moe_lite': ('Glm4MoeLite', HEADLESS | MLA | dict(
    rope_parameters=ROPE, q_lora_rank=20, n_routed_experts=6, num_experts_per_tok=2,
    moe_intermediate_size=20, n_shared_experts=1, n_group=1, topk_group=1, norm_topk_prob=True,
    routed_scaling_factor=1.8, rms_norm_eps=1e-5, tie_word_embeddings=False)),
  'kimi_linear': ('KimiLinear', COMMON | MLA | dict(
    linear_attn_config=KIMI, q_lora_rank=None, num_experts=6, num_experts_per_token=2,
    moe_intermediate_size=20, num_shared_experts=1, first_k_dense_replace=1,
    moe_renormalize=True, routed_scaling_factor=2.4, num_expert_group=1, topk_group=1,
    rms_norm_eps=1e-5, tie_word_embeddings=False)),
}
COMPOSITE = ('qwen3_5', 'qwen3_5_moe')  # with a vision tower, as published


def build(name):
  prefix, fields = FAMILIES[name]
  if name not in COMPOSITE:
    config = getattr(transformers, prefix + 'Config')(**fields)
    return getattr(transformers, prefix + 'ForCausalLM')._from_config(
      config, attn_implementation='eager', dtype=torch.float32)
  config = getattr(transformers, prefix + 'Config')(
    text_config=fields, vision_config=VISION, tie_word_embeddings=fields['tie_word_embeddings'],
    image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
  return getattr(transformers, prefix + 'ForConditionalGeneration')._from_config(
    config, attn_implementation='eager', dtype=torch.float32)


def draw(model, rng):
  """Every parameter and buffer that is saved."""
  for key, x in model.state_dict().items():
    leaf = key.split('.')[-1]
    noise = torch.tensor(rng.normal(size=tuple(x.shape)), dtype=torch.float32)
    if leaf == 'A_log':
      value = torch.tensor(rng.uniform(-1, 1, size=tuple(x.shape)), dtype=torch.float32)
    elif leaf == 'dt_bias':
      value = noise
    elif 'conv1d' in key:
      value = 0.3 * noise
    elif leaf == 'e_score_correction_bias':
      value = 0.3 * noise
    elif x.ndim <= 1 and leaf == 'bias':
      value = 0.1 * noise
    elif x.ndim <= 1:  # norms around their default, 0 or 1
      value = x + 0.2 * noise
    elif 'embed' in key and 'patch' not in key:
      value = noise
    else:
      value = noise * x.shape[-1] ** -0.5
    x.copy_(value)


def make(name):
  torch.manual_seed(0)
  torch.set_num_threads(1)
  rng = np.random.default_rng(0)
  model = build(name).eval()
  folder = os.path.join(FOLDER, name)
  shutil.rmtree(folder, ignore_errors=True)
  found = {}
  with torch.no_grad():
    draw(model, rng)
    model.save_pretrained(folder)
    model = type(model).from_pretrained(folder, attn_implementation='eager', dtype=torch.float32)
    for length in LENGTHS:
      ids = rng.integers(3, 90, size=(1, length))
      out = model(torch.tensor(ids), output_hidden_states=True, use_cache=False)
      found[f'tokens_{length}'] = ids[0].astype(np.int32)
      found[f'logits_{length}'] = out.logits[0].numpy()
      found[f'hidden_{length}'] = torch.stack(out.hidden_states)[:, 0].numpy()
    ids = torch.tensor(found['tokens_5'])[None]
    for _ in range(NEW):
      ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    found['greedy'] = ids[0, 5:].numpy().astype(np.int32)
  np.savez_compressed(os.path.join(folder, 'golden.npz'), **found)
  logits = found['logits_70']
  print(f'{name}: logit std {logits.std():.2f}, {os.listdir(folder)}')


if __name__ == '__main__':
  for chosen in sys.argv[1:] or FAMILIES:
    make(chosen)
