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
from zppo_jax.models import decoder, layers
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

  rules: tuple[rules.LogitRule, ...] = ()  # before all of these

  @property
  def greedy(self) -> bool:
    return self.temperature < GREEDY_BELOW

  @functools.cached_property
  def chain(self) -> tuple[rules.LogitRule, ...]:
    """The rules that do something, in their order; no temperature and no filter when greedy."""
    given = list(self.rules)
    if (self.presence, self.frequency, self.repetition) != (0.0, 0.0, 1.0):
      given.append(rules.penalties(self.presence, self.frequency, self.repetition))
    if self.greedy:
      return tuple(given)
    for rule, value, off in ((rules.temperature, self.temperature, 1.0),
                             (rules.top_k, self.top_k, 0), (rules.top_p, self.top_p, 1.0),
                             (rules.min_p, self.min_p, 0.0)):
      if value != off:
        given.append(rule(value))
    return tuple(given)

  @property
  def filtered(self) -> bool:
    """Whether tokens are drawn from anything but softmax(z / T)."""
    return any(rule.name != 'temperature' for rule in self.chain)


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
  if s.greedy and s.group_size > 1:
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
class Responses:
  """What was drawn of every row, for `assemble`."""

  tokens: Array  # i32[N, R]
  logp: Array  # f32[N, R]
  length: Array  # i32[N]
  done: Array  # bool[N], ended by a stop token
  fault: Array  # bool[N], ended by logits that are not finite
  kept: Array | None = None  # f32[N, R], see `choose`
  traffic: Array | None = None  # i32[N, 4], see `cache.traffic`


@types.record
class _State:
  cache: cache_lib.Cache
  logits: Array  # f32[N, V], of the next token
  tokens: Array  # i32[N, R]
  logp: Array  # f32[N, R]
  kept: Array | None  # f32[N, R], where something filters
  done: Array  # bool[N]
  fault: Array  # bool[N]
  length: Array  # i32[N], response tokens so far
  step: Array  # i32[]
  rules: tuple  # states of the chain


def prefill(config: ModelConfig, params: Params, tokens: Array, length: Array):
  """(cache of prompts i32[P, L], logits f32[P, V] of the first new token).

  The cache is split where its keys are to leave the device: no two layers' need be there at once.
  """
  blocks = decoder.split_blocks(config, params) if config.pooled else params
  # Layers unrolled make a step faster that runs often; this one runs once, and is compiled as well.
  out = decoder.forward(
    dataclasses.replace(config, unroll=1), blocks, tokens,
    segment_ids=masks.segments_from_lengths(length, tokens.shape[1]),
    keep='split' if config.pooled else 'stacked', want='hidden')
  last = jnp.take_along_axis(out.hidden, (length - 1)[:, None, None], axis=1)[:, 0]
  return (dataclasses.replace(out.cache, length=length), decoder.unembed(config, params, last))


def _first_max(x: Array) -> Array:
  """argmax over the last axis, lowest id among ties, i32; two reductions vectorise, argmax does
  not."""
  ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  best = jnp.where(x == jnp.max(x, axis=-1, keepdims=True), ids, x.shape[-1] - 1)
  return jnp.min(best, axis=-1)


def _logp(logits: Array, token: Array) -> Array:
  below = logits - jnp.max(logits, axis=-1, keepdims=True)
  chosen = jnp.take_along_axis(below, token[:, None], axis=1)[:, 0]
  return chosen - jnp.log(jnp.sum(jnp.exp(below), axis=-1))


def choose(logits: Array, keys: Array, step: Array, settings: Settings, states: tuple):
  """Next token i32[N], its log-prob under the distribution it was drawn from, and log kept mass.

  The third is what is missing to the model's own log-prob at that temperature:
  log softmax(z / T)[token] = logp + kept, the log of the mass that filters kept. None where
  nothing filters. keys [N], step i32[N].
  """
  shaped = rules.apply(settings.chain, states, logits, step)
  if settings.greedy:
    token = _first_max(shaped)
  else:
    noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:]))(keys)
    token = _first_max(shaped + noise)
  logp = _logp(shaped, token)
  if not settings.filtered:
    return token, logp, None
  own = logits if settings.greedy else logits / settings.temperature
  return token, logp, _logp(own, token) - logp


def is_finite(logp: Array, kept: Array | None) -> Array:
  """Whether the logits of `choose` were finite: filters hide a NaN from the first of its values."""
  return jnp.isfinite(logp if kept is None else logp + kept)


def force(drawn, forced: Array, forced_length: Array, step: Array):
  """`choose`'s triple where a row is free, the given token with zeros inside its forced prefix."""
  if not forced.shape[1]:
    return drawn
  column = jnp.minimum(step, forced.shape[1] - 1)[:, None]
  given = jnp.take_along_axis(forced, column, axis=1)[:, 0]
  inside = step < forced_length
  token, *values = drawn
  return jnp.where(inside, given, token), *jax.tree.map(
    lambda x: jnp.where(inside, 0.0, x), values)


def _decode(config, params, prompts: Prompts, key: Array, settings: Settings) -> _State:
  group = settings.group_size
  rep = functools.partial(jnp.repeat, repeats=group, axis=0)
  forced, forced_length, valid = map(rep, (prompts.forced, prompts.forced_length, prompts.valid))
  sample = jnp.tile(jnp.arange(group), prompts.length.shape[0])
  eos = jnp.asarray(settings.eos_ids, jnp.int32)
  width, chain = settings.max_new_tokens, settings.chain
  keys = rng.fold_each(key, rep(prompts.request), sample)

  def body(state: _State) -> _State:
    step = jnp.broadcast_to(state.step, valid.shape)
    drawn = choose(state.logits, rng.fold_each(keys, step), step, settings, state.rules)
    token, logp, kept = force(drawn, forced, forced_length, step)
    fault = ~state.done & ~is_finite(logp, kept)
    live = ~state.done & ~fault
    put = lambda old, new: old.at[:, state.step].set(jnp.where(live, new, 0))
    tokens = put(state.tokens, token)
    logps, kept = jax.tree.map(put, (state.logp, state.kept), (logp, kept))
    done = state.done | fault | jnp.any(token[:, None] == eos, axis=1)
    out = decoder.forward(config, blocks, token[:, None], cache=state.cache, prefix=prefix,
                          want='hidden', rotary=angles)
    logits = decoder.unembed(config, params, out.hidden[:, 0])
    return _State(out.cache, logits, tokens, logps, kept, done, state.fault | fault,
                  state.length + live, state.step + 1,
                  rules.update(chain, state.rules, token, step, live))

  cache, logits = prefill(config, params, prompts.tokens, prompts.length)
  blocks, logits = decoder.split_blocks(config, params), rep(logits)  # once, not in every step
  rows = valid.shape[0]
  if config.sparse is None:
    prefix = cache_lib.as_prefix(cache)
    cache = cache_lib.split(config, rows, width, prefix)
    prefix = cache_lib.split_prefix(config, prefix)
  else:  # which keys are read is chosen among all of a row
    prefix = None
    cache = cache_lib.whole(config, cache, group, prompts.tokens.shape[1] + width)
  angles = layers.rotary_table(config, prompts.tokens.shape[1] + width)
  given = rules.Given(prompts.tokens, prompts.length, config.vocab, width)
  blank = jnp.zeros((rows, width))
  state = _State(
    cache, logits, jnp.zeros((rows, width), jnp.int32), blank,
    blank if settings.filtered else None, ~valid, jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32),
    jnp.int32(0), jax.tree.map(rep, rules.init(chain, given)))
  return jax.lax.while_loop(lambda s: (s.step < width) & jnp.any(~s.done), body, state)


def assemble(prompts: Prompts, drawn: Responses, settings: Settings, version: Array
             ) -> types.Rollout:
  """Joins prompts and responses into rows without a gap; `version` i32[] or i32[N, R] of tokens."""
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
  hits = absent = None
  if drawn.traffic is not None:
    wanted, missing, _, absent = jnp.moveaxis(drawn.traffic.astype(jnp.float32), 1, 0)
    some = jnp.maximum(wanted, 1)
    hits, absent = 1 - missing / some, absent / some
  per_token = lambda x: jnp.where(sampled, masks.put_window(x, start, total) if x.ndim else x, 0)
  return types.Rollout(
    tokens=jnp.where(column < start[:, None], prompt_part, jnp.where(in_response, response, 0)),
    segment_ids=segments,
    positions=jnp.where(segments > 0, column, 0).astype(jnp.int32),
    loss_mask=sampled,
    behavior_logp=per_token(drawn.logp),
    version=per_token(version).astype(jnp.int32),
    turn_id=in_response.astype(jnp.int32),
    group_id=rep(prompts.group_id),
    traj_id=rep(prompts.group_id) * group + jnp.tile(jnp.arange(group), num),
    traj_tokens=jnp.sum(sampled, axis=1).astype(jnp.float32),
    role_id=jnp.zeros(rows, jnp.int32),
    kind=rep(prompts.kind),
    question_id=rep(prompts.question_id),
    reward=jnp.where(drawn.fault, jnp.nan, jnp.zeros(rows)),
    status=jnp.select([drawn.fault, drawn.done], [types.NONFINITE, types.FINISHED],
                      types.TRUNCATED).astype(jnp.int32),
    valid=valid,
    log_kept_mass=None if drawn.kept is None else per_token(drawn.kept),
    pool_hits=hits, pool_absent=absent)


@functools.partial(jax.jit, static_argnames=('config', 'settings'))
def generate(config: ModelConfig, params: Params, prompts: Prompts, *, key: Array,
             settings: Settings, version: Array | int = 0) -> types.Rollout:
  """Samples settings.group_size responses per prompt; rewards are left at zero.

  A row whose logits are not finite ends before the token that they would have drawn, with the
  status NONFINITE and the reward NaN, which keeps it out of losses and statistics.

  `behavior_logp` is the log-prob in nats under the distribution actually sampled (after temperature
  and filters). A row ends at the first id of settings.eos_ids, which belongs to the response. The
  loop leaves early when every row is done.
  """
  check_settings(settings)
  prompts = axes.constrain_rows(prompts)
  state = _decode(config, params, prompts, key, settings)
  drawn = Responses(state.tokens, state.logp, state.length, state.done, state.fault, state.kept,
                    cache_lib.traffic(state.cache))
  return assemble(prompts, drawn, settings, jnp.asarray(version, jnp.int32))
