"""Log-probs of given tokens, by the same forward that sampled them."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from zppo_jax.core import masks, types
from zppo_jax.models import cache as cache_lib
from zppo_jax.models import decoder
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.params import Params
from zppo_jax.ops import logprobs


@types.record
class Scored:
  """Per-token results; entries are zero outside the loss mask. Hidden states are windowed."""

  logp: types.Array  # f32[N, T]
  entropy: types.Array  # f32[N, T], nats
  hidden: types.Array  # [N, W, D], the state that predicts window column w
  start: types.Array  # i32[N], first column of the window
  taps: dict[str, types.Array]  # [N, T, D]


def group_start(mask: types.Array, group: int, size: int) -> types.Array:
  """First loss column of each group of rows, within 1 .. T - size, i32[P]; 1 for a blank group."""
  total = mask.shape[1]
  first = jnp.where(mask.any(axis=1), jnp.argmax(mask, axis=1), total)
  first = first.reshape(-1, group).min(axis=1)
  return jnp.where(first == total, 1, jnp.clip(first, 1, total - size)).astype(jnp.int32)


def grouped_states(config: ModelConfig, params: Params, rollout: types.Rollout, *, window: int,
                   group: int):
  """`states` when each `group` neighbouring rows share their prompt: it runs once per group.

  The last prompt token opens the window of each row, so that its state predicts the first loss
  token; what comes before is the prefix. Same numbers as `states` up to rounding.
  """
  config = dataclasses.replace(config, sparse=None)
  first = group_start(rollout.loss_mask, group, window)
  start = jnp.repeat(first, group)
  size = rollout.tokens.shape[1] - window
  prompts = decoder.forward(
    config, params, rollout.tokens[::group, :size],
    segment_ids=masks.segments_from_lengths(first - 1, size),
    keep='stacked', want='hidden')
  take = lambda x: masks.take_window(x, start - 1, window)
  out = decoder.forward(
    config, params, take(rollout.tokens), segment_ids=take(rollout.segment_ids),
    positions=take(rollout.positions), prefix=cache_lib.as_prefix(prompts.cache), want='hidden')
  return out.hidden, start, {}


def states(config: ModelConfig, params: Params, rollout: types.Rollout, *, window: int, taps=(),
           group: int = 1):
  """Hidden states that predict the columns of the loss window: ([N, W, D], start, taps).

  The window is the `window` columns from the first loss token on, so that nobody pays for the
  vocabulary on prompt tokens. It must cover the loss mask (sampling makes it so). Without taps,
  `group` neighbouring rows with one prompt share its computation.
  """
  if group > 1 and not taps and window < rollout.tokens.shape[1]:
    return grouped_states(config, params, rollout, window=window, group=group)
  out = decoder.forward(config, params, rollout.tokens, segment_ids=rollout.segment_ids,
                        positions=rollout.positions, taps=taps, want='hidden')
  start = masks.window_start(rollout.loss_mask, window)
  shifted = jnp.pad(out.hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
  return masks.take_window(shifted, start, window), start, out.taps


def score(config: ModelConfig, params: Params, rollout: types.Rollout, *, window: int,
          temperature: float = 1.0, chunk: int = 1024, taps=(), group: int = 1) -> Scored:
  """log pi(token t | tokens < t) and entropy where rollout.loss_mask is set; differentiable."""
  hidden, start, found = states(config, params, rollout, window=window, taps=taps, group=group)
  targets = masks.take_window(rollout.tokens, start, window)
  logp, entropy = logprobs.logprobs_chunked(
    hidden, decoder.unembedding(params), targets, chunk=chunk, temperature=temperature,
    logit_cap=config.logit_cap, num_valid=config.num_valid)
  total = rollout.tokens.shape[1]

  def place(x):
    return jnp.where(rollout.loss_mask, masks.put_window(x, start, total), 0.0)

  return Scored(place(logp), place(entropy), hidden, start, found)


