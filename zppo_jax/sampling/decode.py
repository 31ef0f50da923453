"""Prefill once per prompt, then decode all samples of all groups in one jitted loop.

Dims: P prompts, G samples each, N = P * G rows, L prompt bucket, R response bucket, T = L + R.
A row is its prompt, then its response, then padding: no left padding, no gap. The noise of a token
is a function of (key, request, sample, response index) alone, so a sample never depends on what
else is in the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from zppo_jax.core import masks, rng, types
from zppo_jax.mesh import axes
from zppo_jax.models import cache as cache_lib
from zppo_jax.models import decoder
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.params import Params
from zppo_jax.sampling import rules

Array = jax.Array
GREEDY_BELOW = 1e-5  # temperatures under this take the argmax


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to sample; static under jit. `top_k=0, top_p=1, min_p=0` switch the filters off,
  `presence=0, frequency=0, repetition=1` the penalties."""

  max_new_tokens: int
  eos_ids: tuple[int, ...]
  group_size: int = 1
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  presence: float = 0.0  # taken from the logits of tokens that the response holds
  frequency: float = 0.0  # the same, times how often
  repetition: float = 1.0  # divides the logits of tokens that the prompt or the response holds

  @property
  def penalises(self) -> bool:
    return (self.presence, self.frequency, self.repetition) != (0.0, 0.0, 1.0)


def check_settings(s: Settings) -> None:
  """Raises ValueError naming the argument, the bound and the value."""
  bounds = (('max_new_tokens', s.max_new_tokens >= 1, 'at least 1'),
            ('group_size', s.group_size >= 1, 'at least 1'),
            ('temperature', s.temperature >= 0, 'at least 0'),
            ('top_k', s.top_k >= 0, 'at least 0'),
            ('top_p', 0 < s.top_p <= 1, 'in (0, 1]'),
            ('min_p', 0 <= s.min_p < 1, 'in [0, 1)'),
            ('presence', math.isfinite(s.presence), 'finite'),
            ('frequency', math.isfinite(s.frequency), 'finite'),
            ('repetition', 0 < s.repetition < math.inf, 'above 0 and finite'),
            ('eos_ids', len(s.eos_ids) > 0, 'not empty'))
  for name, fine, bound in bounds:
    if not fine:
      raise ValueError(f'{name} must be {bound}, got {getattr(s, name)}')
  if s.temperature < GREEDY_BELOW and s.group_size > 1:
    raise ValueError(f'temperature 0 draws {s.group_size} equal samples: group_size must be 1')


def call_slots(slots: int, limit: int) -> int:
  """Prompts per call of `generate`: the largest divisor of `slots` within `limit` (0 = all)."""
  return max(d for d in range(1, min(limit or slots, slots) + 1) if slots % d == 0)


@types.record
class Prompts:
  """Right-padded prompts; `forced` tokens open every response of the group and are not sampled."""

  tokens: Array  # i32[P, L]
  length: Array  # i32[P], at least 1
  forced: Array  # i32[P, F]
  forced_length: Array  # i32[P]
  request: Array  # u32[P], names the noise of the group
  group_id: Array  # i32[P]
  kind: Array  # i32[P]
  question_id: Array  # i32[P]
  valid: Array  # bool[P]; an invalid prompt costs nothing and yields invalid rows


@types.record
class Seen:
  """Tokens that a row holds, for the penalties."""

  counts: Array  # i32[N, V], of the response
  prompt: Array  # bool[N, V]

  def add(self, token: Array, live: Array) -> Seen:
    rows = jnp.arange(len(token))
    return Seen(self.counts.at[rows, token].add(live.astype(jnp.int32)), self.prompt)


def seen_prompts(config: ModelConfig, tokens: Array, length: Array) -> Array:
  """bool[P, V] of prompts i32[P, L]."""
  rows = jnp.arange(tokens.shape[0])[:, None]
  inside = jnp.arange(tokens.shape[1])[None] < length[:, None]
  return jnp.zeros((tokens.shape[0], config.vocab), bool).at[rows, tokens].max(inside)


@types.record
class Responses:
  """What was drawn of every row, for `assemble`."""

  tokens: Array  # i32[N, R]
  logp: Array  # f32[N, R]
  length: Array  # i32[N]
  done: Array  # bool[N], ended by a stop token


@types.record
class _State:
  cache: cache_lib.Cache
  logits: Array  # f32[N, V], of the next token
  tokens: Array  # i32[N, R]
  logp: Array  # f32[N, R]
  done: Array  # bool[N]
  length: Array  # i32[N], response tokens so far
  step: Array  # i32[]
  seen: Seen | None  # where the settings penalise


def prefill(config: ModelConfig, params: Params, tokens: Array, length: Array):
  """(cache of prompts i32[P, L], logits f32[P, V] of the first new token)."""
  rows, size = tokens.shape
  out = decoder.forward(
    config, params, tokens, segment_ids=masks.segments_from_lengths(length, size),
    cache=cache_lib.init(config, rows, size), want='hidden')
  last = jnp.take_along_axis(out.hidden, (length - 1)[:, None, None], axis=1)[:, 0]
  return out.cache, decoder.unembed(config, params, last)


def _first_max(x: Array) -> Array:
  """argmax over the last axis, lowest id among ties, i32; two reductions vectorise, argmax does
  not."""
  ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  best = jnp.where(x == jnp.max(x, axis=-1, keepdims=True), ids, x.shape[-1] - 1)
  return jnp.min(best, axis=-1)


def choose(logits: Array, row_keys: Array, step: Array, settings: Settings,
           seen: Seen | None = None):
  """Next token i32[N] and its log-prob under the distribution it was drawn from; step i32[N]."""
  if seen is not None:
    logits = rules.penalise(logits, seen.counts, seen.prompt, presence=settings.presence,
                            frequency=settings.frequency, repetition=settings.repetition)
  if settings.temperature < GREEDY_BELOW:
    shaped, token = logits, _first_max(logits)
  else:
    shaped = rules.apply(logits, temperature=settings.temperature, k=settings.top_k,
                         p=settings.top_p, floor=settings.min_p)
    noise = jax.vmap(lambda k, s: jax.random.gumbel(rng.fold(k, s), logits.shape[1:]))(
      row_keys, step)
    token = _first_max(shaped + noise)
  below = shaped - jnp.max(shaped, axis=-1, keepdims=True)
  chosen = jnp.take_along_axis(below, token[:, None], axis=1)[:, 0]
  return token, chosen - jnp.log(jnp.sum(jnp.exp(below), axis=-1))


def force(token: Array, logp: Array, forced: Array, forced_length: Array, step: Array):
  """The given token, with log-prob 0, where a row is inside its forced prefix; step i32[N]."""
  if not forced.shape[1]:
    return token, logp
  column = jnp.minimum(step, forced.shape[1] - 1)[:, None]
  given = jnp.take_along_axis(forced, column, axis=1)[:, 0]
  inside = step < forced_length
  return jnp.where(inside, given, token), jnp.where(inside, 0.0, logp)


def row_keys(key: Array, request: Array, sample: Array) -> Array:
  """The noise of a row is named by its request and its number in the group."""
  return jax.vmap(lambda r, s: rng.fold(key, r, s))(request, sample)


def _decode(config, params, prompts: Prompts, key: Array, settings: Settings) -> _State:
  group = settings.group_size
  rep = functools.partial(jnp.repeat, repeats=group, axis=0)
  forced, forced_length, valid = map(rep, (prompts.forced, prompts.forced_length, prompts.valid))
  sample = jnp.tile(jnp.arange(group), prompts.length.shape[0])
  keys = row_keys(key, rep(prompts.request), sample)
  eos = jnp.asarray(settings.eos_ids, jnp.int32)
  width = settings.max_new_tokens

  def body(state: _State) -> _State:
    step = jnp.broadcast_to(state.step, valid.shape)
    token, logp = force(*choose(state.logits, keys, step, settings, state.seen), forced,
                        forced_length, step)
    live = ~state.done
    tokens = state.tokens.at[:, state.step].set(jnp.where(live, token, 0))
    logps = state.logp.at[:, state.step].set(jnp.where(live, logp, 0.0))
    done = state.done | jnp.any(token[:, None] == eos, axis=1)
    out = decoder.forward(config, blocks, token[:, None], cache=state.cache, prefix=prefix,
                          want='hidden')
    logits = decoder.unembed(config, params, out.hidden[:, 0])
    seen = None if state.seen is None else state.seen.add(token, live)
    return _State(out.cache, logits, tokens, logps, done, state.length + live, state.step + 1, seen)

  cache, logits = prefill(config, params, prompts.tokens, prompts.length)
  prefix, logits = cache_lib.as_prefix(cache), rep(logits)
  blocks = decoder.split_blocks(config, params)  # once, not in every step
  rows = valid.shape[0]
  cache = cache_lib.split(config, rows, width, prefix)
  prefix = cache_lib.split_prefix(config, prefix)
  seen = None
  if settings.penalises:
    seen = Seen(jnp.zeros((rows, config.vocab), jnp.int32),
                rep(seen_prompts(config, prompts.tokens, prompts.length)))
  state = _State(cache, logits, jnp.zeros((rows, width), jnp.int32), jnp.zeros((rows, width)),
                 ~valid, jnp.zeros(rows, jnp.int32), jnp.int32(0), seen)
  return jax.lax.while_loop(lambda s: (s.step < width) & jnp.any(~s.done), body, state)


def assemble(prompts: Prompts, drawn: Responses, settings: Settings, version: Array
             ) -> types.Rollout:
  """Joins prompts and responses into rows without a gap."""
  group, (num, bucket) = settings.group_size, prompts.tokens.shape
  rows, width = drawn.tokens.shape
  total = bucket + width
  rep = functools.partial(jnp.repeat, repeats=group, axis=0)
  start, forced_length, valid = map(rep, (prompts.length, prompts.forced_length, prompts.valid))
  column = jnp.arange(total)[None]
  prompt_part = jnp.pad(rep(prompts.tokens), ((0, 0), (0, width)))
  response = masks.put_window(drawn.tokens, start, total)
  in_response = (column >= start[:, None]) & (column < (start + drawn.length)[:, None])
  sampled = in_response & (column >= (start + forced_length)[:, None]) & valid[:, None]
  segments = masks.segments_from_lengths(start + drawn.length, total)
  return types.Rollout(
    tokens=jnp.where(column < start[:, None], prompt_part, jnp.where(in_response, response, 0)),
    segment_ids=segments,
    positions=jnp.where(segments > 0, column, 0).astype(jnp.int32),
    loss_mask=sampled,
    behavior_logp=jnp.where(sampled, masks.put_window(drawn.logp, start, total), 0.0),
    version=jnp.where(sampled, version, 0).astype(jnp.int32),
    turn_id=in_response.astype(jnp.int32),
    group_id=rep(prompts.group_id),
    traj_id=rep(prompts.group_id) * group + jnp.tile(jnp.arange(group), num),
    traj_tokens=jnp.sum(sampled, axis=1).astype(jnp.float32),
    role_id=jnp.zeros(rows, jnp.int32),
    kind=rep(prompts.kind),
    question_id=rep(prompts.question_id),
    reward=jnp.zeros(rows),
    status=jnp.where(drawn.done, types.FINISHED, types.TRUNCATED).astype(jnp.int32),
    valid=valid)


@functools.partial(jax.jit, static_argnames=('config', 'settings'))
def generate(config: ModelConfig, params: Params, prompts: Prompts, *, key: Array,
             settings: Settings, version: Array | int = 0) -> types.Rollout:
  """Samples settings.group_size responses per prompt; rewards are left at zero.

  `behavior_logp` is the log-prob in nats under the distribution actually sampled (after temperature
  and filters). A row ends at the first id of settings.eos_ids, which belongs to the response. The
  loop leaves early when every row is done.
  """
  check_settings(settings)
  prompts = jax.tree.map(lambda x: axes.constrain(x, 'batch', *(None,) * (x.ndim - 1)), prompts)
  state = _decode(config, params, prompts, key, settings)
  drawn = Responses(state.tokens, state.logp, state.length, state.done)
  return assemble(prompts, drawn, settings, jnp.asarray(version, jnp.int32))
