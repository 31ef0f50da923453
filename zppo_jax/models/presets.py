"""Models by name: the fields that `--config.model.preset=NAME` sets.

Published shapes are those of the checkpoints' own config files; weights come from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from zppo_jax.models.config import Mla, Moe, Rope

HYBRID = ('gdn', 'gdn', 'gdn', 'full')


def _qwen3(hidden: int, layers: int, heads: int, kv_heads: int, inter: int, *, tied: bool,
           moe: Moe | None = None) -> dict[str, Any]:
  return dict(vocab=151_936, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads,
              head_dim=128, inter=inter, tied=tied, rope_theta=1e6, context=40_960,
              **_mixture(moe, 'qwen3_moe', 'qwen3'))


def _mixture(moe: Moe | None, name: str, dense: str) -> dict[str, Any]:
  return dict(family=dense) if moe is None else dict(family=name, moe=moe, mlps=('moe',))


def _qwen35(hidden: int, layers: int, heads: int, kv_heads: int, inter: int, values: int, *,
            tied: bool, moe: Moe | None = None, vocab: int = 248_320,
            families: tuple[str, str] = ('qwen3_5_moe_text', 'qwen3_5_text')) -> dict[str, Any]:
  return dict(vocab=vocab, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads,
              head_dim=256, inter=inter, tied=tied, rope_theta=1e7, rope_dim=64, context=262_144,
              mixers=HYBRID, norm='one_plus', attn_gate=True, linear_heads=16,
              linear_value_heads=values, linear_key_dim=128, linear_value_dim=128,
              **_mixture(moe, *families))


def _llama(hidden: int, layers: int, heads: int, head_dim: int, inter: int, factor: float, *,
           tied: bool) -> dict[str, Any]:
  return dict(vocab=128_256, hidden=hidden, layers=layers, heads=heads, kv_heads=8,
              head_dim=head_dim, inter=inter, tied=tied, qk_norm=False, norm_eps=1e-5,
              rope_theta=5e5, rope=Rope('llama3', factor, 8192), context=131_072, family='llama')


def _gemma2(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, inter: int,
            scale: int) -> dict[str, Any]:
  return dict(vocab=256_000, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads,
              head_dim=head_dim, inter=inter, tied=True, qk_norm=False, rope_theta=1e4,
              mixers=('sliding', 'full'), window=4096, norm='one_plus', sandwich=True,
              act='gelu_tanh', attn_scale=scale**-0.5, attn_cap=50.0, logit_cap=30.0,
              embed_scale=hidden**0.5, context=8192, family='gemma2')


def _glm_flash() -> dict[str, Any]:
  return dict(vocab=154_880, hidden=2048, layers=47, heads=20, kv_heads=20, head_dim=256,
              inter=10_240, tied=False, qk_norm=False, norm_eps=1e-5, rope_theta=1e6,
              mixers=('mla',), mlps=('dense',) + ('moe',) * 46,
              mla=Mla(512, 192, 64, 256, query_rank=768),
              moe=Moe(64, 4, 1536, score='sigmoid', scale=1.8, bias=True, shared=1536),
              context=202_752, family='glm4_moe_lite')


def _kimi_linear() -> dict[str, Any]:
  full = (4, 8, 12, 16, 20, 24, 27)  # counted from 1
  return dict(vocab=163_840, hidden=2304, layers=27, heads=32, kv_heads=32, head_dim=192,
              inter=9216, tied=False, qk_norm=False, norm_eps=1e-5,
              mixers=tuple('mla' if i in full else 'kda' for i in range(1, 28)),
              mlps=('dense',) + ('moe',) * 26, mla=Mla(512, 128, 64, 128, pairs='none'),
              moe=Moe(256, 8, 1024, score='sigmoid', scale=2.446, bias=True, shared=1024),
              linear_heads=32, linear_value_heads=32, linear_key_dim=128, linear_value_dim=128,
              context=1_048_576, family='kimi_linear')


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
  # Three linear layers to one of softmax attention, as in the published hybrids.
  'hybrid_tiny': dict(
    hidden=96, layers=4, heads=4, kv_heads=2, head_dim=24, inter=256, linear_heads=2,
    linear_value_heads=4, linear_key_dim=16, linear_value_dim=16,
    mixers=('fg2_gdn_plus', 'fg2_gdn_plus', 'fg2_gdn_plus', 'full')),
  'qwen3-0.6b': _qwen3(1024, 28, 16, 8, 3072, tied=True),
  'qwen3-1.7b': _qwen3(2048, 28, 16, 8, 6144, tied=True),
  'qwen3-4b': _qwen3(2560, 36, 32, 8, 9728, tied=True),
  'qwen3-8b': _qwen3(4096, 36, 32, 8, 12_288, tied=False),
  'qwen3-14b': _qwen3(5120, 40, 40, 8, 17_408, tied=False),
  'qwen3-32b': _qwen3(5120, 64, 64, 8, 25_600, tied=False),
  'qwen3-30b-a3b': _qwen3(2048, 48, 32, 4, 6144, tied=False, moe=Moe(128, 8, 768)),
  'qwen3.5-0.8b': _qwen35(1024, 24, 8, 2, 3584, 16, tied=True),
  'qwen3.5-2b': _qwen35(2048, 24, 8, 2, 6144, 16, tied=True),
  'qwen3.5-4b': _qwen35(2560, 32, 16, 4, 9216, 32, tied=True),
  'qwen3.5-9b': _qwen35(4096, 32, 16, 4, 12_288, 32, tied=False),
  'qwen3.5-27b': _qwen35(5120, 64, 24, 4, 17_408, 48, tied=False),
  'qwen3.5-35b-a3b': _qwen35(2048, 40, 16, 2, 512, 32, tied=False, moe=Moe(
    256, 8, 512, shared=512, shared_gate=True)),
  'qwen3-next-80b-a3b': _qwen35(2048, 48, 16, 2, 5120, 32, tied=False, vocab=151_936, moe=Moe(
    512, 10, 512, shared=512, shared_gate=True), families=('qwen3_next', '')),
  'llama-3.2-1b': _llama(2048, 16, 32, 64, 8192, 32.0, tied=True),
  'llama-3.2-3b': _llama(3072, 28, 24, 128, 8192, 32.0, tied=True),
  'llama-3.1-8b': _llama(4096, 32, 32, 128, 14_336, 8.0, tied=False),
  'gemma-2-2b': _gemma2(2304, 26, 8, 4, 256, 9216, 256),
  'gemma-2-9b': _gemma2(3584, 42, 16, 8, 256, 14_336, 256),
  'gemma-2-27b': _gemma2(4608, 46, 32, 16, 128, 36_864, 144),
  'glm-4.7-flash': _glm_flash(),
  'kimi-linear-48b-a3b': _kimi_linear(),
})


def expand(section: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a model section with those of its preset, if it names one, in their place.

  Raises ValueError on an unknown name.
  """
  fields = dict(section)
  name = fields.pop('preset', '')
  if not name:
    return fields
  if name not in PRESETS:
    raise ValueError(f'model.preset {name!r} is not one of {sorted(PRESETS)}')
  return fields | PRESETS[name]
