"""Attention of one new token over a long cache at a fixed budget (AsyncTLS, arXiv 2604.07815)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels.common import dispatch
from kernels.tls_attention import chunked, levels, pallas_gpu, pallas_tpu
from kernels.tls_attention import config as config_lib
from kernels.tls_attention.config import Array, Config, State

# Modules with `token_scores` and `attend`: what reads the cache.
IMPLEMENTATIONS = {'chunked': chunked, 'pallas_tpu': pallas_tpu, 'pallas_gpu': pallas_gpu}
DEFAULT = ('pallas_tpu', 'chunked')


def decode(q: Array, key: Array, value: Array | int | None, state: State, *, channels: Array,
           length: Array, config: Config, scale: float | None = None,
           implementation: str | Sequence[str] | None = None) -> tuple[Array, State]:
  """softmax(scale q . k) v over at most config.top_tokens tokens per key head.

  The blocks with the largest bounds of q . k, in them the tokens with the largest 4-bit scores,
  over those exact attention. q [B, HQ, D] of the token number length[b] - 1, whose key and value
  [B, HK, N, D] and [B, HK, N, V] are in the cache and in `state` already; an int V for `value` is
  the first V channels of the keys (latent attention), and None says that `key` is packed,
  [B, HK, N, 2, D] by `pack`; channels i32[HK, R] by `calibrate`. With config.stale the tokens come
  from the blocks that the query before chose, which a pool may have fetched meanwhile; this query's
  blocks are the state's next ones.

  Returns (out [B, HQ, V] in the dtype of value, state). Scale defaults to D ** -0.5. Raises
  ValueError on shapes or settings that do not fit. There is no gradient through the choice.
  """
  config_lib.check(config, q, key, channels)
  chosen = choose(q, state, length=length, config=config).chosen
  candidates = state.chosen if config.stale else chosen
  out = read(q, key, value, state, candidates, candidates, channels=channels, length=length,
             config=config, scale=scale, implementation=implementation)
  return out, dataclasses.replace(state, chosen=chosen)


def choose(q: Array, state: State, *, length: Array, config: Config) -> State:
  """The first level alone: state.chosen = the blocks with the largest bounds of q . k.

  With the last query of a prompt it gives the first stale step its candidates.
  """
  scores = levels.block_scores(q, state.summary, length, config)
  return dataclasses.replace(state, chosen=levels.choose_blocks(scores, length, config))


def read(q: Array, key: Array, value: Array | int | None, state: State, candidates: Array,
         pages: Array, *, channels: Array, length: Array, config: Config,
         scale: float | None = None,
         implementation: str | Sequence[str] | None = None) -> Array:
  """The second and third level: attention over the best tokens of the candidate blocks.

  Block candidates[b, h, i], NB = none, lies at rows pages[b, h, i] * block of key [B, HK, rows, D]
  and of value: the same numbers for a whole cache, slots for a pool.
  """
  scale = q.shape[-1] ** -0.5 if scale is None else scale

  def by(target):
    scores = target.token_scores(q, state.labels, channels, candidates, length, config, scale)
    return target.attend(q, key, value, pages, scores, config, scale)

  table = {name: functools.partial(by, target) for name, target in IMPLEMENTATIONS.items()}
  return _no_gradient(dispatch.run('tls_attention', table, implementation, DEFAULT))


@jax.custom_jvp
def _no_gradient(out: Array) -> Array:
  return out


@_no_gradient.defjvp
def _refuse(primals, tangents):
  raise NotImplementedError('tls_attention.decode has no gradient: its choice of tokens is not '
                            'differentiable')


def turnover(before: State, after: State, blocks: int) -> Array:
  """Blocks chosen now and not before, i32[B, HK]: what an offloaded cache has to fetch."""
  new = after.chosen[..., :, None] != before.chosen[..., None, :]
  return jnp.sum(jnp.all(new, axis=-1) & (after.chosen < blocks), axis=-1)
