"""Floating-point operations of a forward pass, by formula; a multiply-add counts as two."""

from __future__ import annotations

from zppo_jax.models.config import DELTA_KINDS, ModelConfig


def forward(config: ModelConfig, length: int, *, logits: bool = True) -> float:
  """Operations per token in a row of `length` tokens: products with weights that the token passes
  (top_k experts of a mixture), causal attention over half of the row on average, recurrent states.
  """
  total = sum(_mixer(config, mixer, length) + _mlp(config, mlp) for mixer, mlp in config.kinds)
  return total + (2.0 * config.hidden * config.vocab if logits else 0.0)


def _mixer(c: ModelConfig, kind: str, length: int) -> float:
  if kind in DELTA_KINDS:
    keys, values = c.linear_heads * c.linear_key_dim, c.linear_value_heads * c.linear_value_dim
    gates = 2 * c.linear_value_heads if kind == 'gdn' else 0
    weights = c.hidden * (2 * keys + 3 * values + gates)
    if kind != 'gdn':  # decays, rates and gates of low rank
      pairs = 2 if kind == 'kda' else 3
      weights += pairs * c.linear_value_dim * (c.hidden + values) - c.hidden * values
    return 2.0 * weights + 7.0 * c.linear_value_heads * c.linear_key_dim * c.linear_value_dim
  if kind == 'mla':
    m, size = c.mla, c.mla.nope + c.mla.rope
    query = (c.hidden * m.query_rank + m.query_rank * c.heads * size if m.query_rank else
             c.hidden * c.heads * size)
    weights = query + c.hidden * (m.rank + m.rope) + m.rank * c.heads * (m.nope + m.value)
    weights += c.heads * m.value * c.hidden
    return 2.0 * weights + 2.0 * c.heads * (size + m.value) * length / 2
  seen = min(length / 2, c.window) if kind == 'sliding' else length / 2
  weights = c.hidden * c.head_dim * (c.heads * (2 + c.attn_gate) + 2 * c.kv_heads)
  return 2.0 * weights + 4.0 * c.heads * c.head_dim * seen


def _mlp(c: ModelConfig, kind: str) -> float:
  if kind == 'dense':
    return 6.0 * c.hidden * c.inter
  return 6.0 * c.hidden * (c.moe.inter * c.moe.top_k + c.moe.shared) + 2.0 * c.hidden * (
    c.moe.experts)
