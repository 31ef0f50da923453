"""Causal self-attention of whole rows, by the fastest implementation that runs here."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels.attention import blocked, reference, splash, triton
from kernels.common import dispatch

Array = jax.Array
IMPLEMENTATIONS = {'reference': reference.attention, 'blocked': blocked.attention,
                   'splash': splash.attention, 'triton': triton.attention}
# Triton's is by name only: its speed has not been measured.
DEFAULT = 'splash', 'blocked'


def attention(query: Array, key: Array, value: Array, *, segment_ids: Array | None = None,
              scale: float | None = None, window: int = 0, cap: float | None = None,
              query_chunk: int | None = None,
              implementation: str | Sequence[str] | None = None) -> Array:
  """softmax(cap tanh(scale q k / cap)) v over the segment up to the query, [B, T, H, V].

  query [B, T, H, K], key [B, T, KV, K], value [B, T, KV, V], KV a divisor of H; segment_ids
  i32[B, T], None = one segment. `scale` defaults to K ** -0.5; `window` keys are seen, the own one
  included (0 = all); `query_chunk` queries at a time in 'blocked'. Raises ValueError with every
  argument that does not fit, NotImplementedError where a named implementation cannot run.
  """
  _check(query, key, value, segment_ids, window)
  if segment_ids is None:
    segment_ids = jnp.ones(query.shape[:2], jnp.int32)
  table = dict(IMPLEMENTATIONS)
  if query_chunk is not None:
    table['blocked'] = lambda *a, **k: blocked.attention(*a, **k, query_chunk=query_chunk)
  return dispatch.run(
    'attention', table, implementation, DEFAULT, query, key, value, segment_ids=segment_ids,
    scale=query.shape[-1] ** -0.5 if scale is None else scale, window=window, cap=cap)


def _check(query, key, value, segment_ids, window) -> None:
  wrong = []
  if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
    raise ValueError(f'attention: query {query.shape}, key {key.shape} and value {value.shape} '
                     'must be [batch, time, heads, size]')
  batch, time, heads, size = query.shape
  if key.shape != (batch, time, key.shape[2], size) or not key.shape[2] or heads % key.shape[2]:
    wrong.append(f'key {key.shape}, expected ({batch}, {time}, KV, {size}) with KV a divisor of '
                 f'the {heads} heads')
  if value.shape[:3] != key.shape[:3]:
    wrong.append(f'value {value.shape}, expected {key.shape[:3]} as key')
  for name, x in (('key', key), ('value', value)):
    if x.dtype != query.dtype:
      wrong.append(f'{name} {x.dtype}, expected {query.dtype} as query')
  if segment_ids is not None and segment_ids.shape != (batch, time):
    wrong.append(f'segment_ids {segment_ids.shape}, expected {(batch, time)}')
  if window < 0:
    wrong.append(f'window must be at least 0, got {window}')
  if wrong:
    raise ValueError('attention: ' + '; '.join(wrong))
