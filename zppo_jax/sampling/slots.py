"""Rows in flight, and the programs that move them: static shapes, donated buffers.

Dims: B slots, P prompts of a prefill, L prompt bucket, R response bucket, C tokens of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from zppo_jax.core import masks, rng, types
from zppo_jax.mesh import axes
from zppo_jax.models import cache as cache_lib
from zppo_jax.models import decoder
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.params import Params
from zppo_jax.sampling import decode, rules

Array = jax.Array


@types.record
class Slots:
  """Rows in flight. A split cache whose rows hold prompt and response in one piece."""

  cache: cache_lib.Cache
  logits: Array  # f32[B, V], of the next token
  tokens: Array  # i32[B, R]
  logp: Array  # f32[B, R]
  kept: Array | None  # f32[B, R], where something filters
  length: Array  # i32[B], response tokens so far
  limit: Array  # i32[B], most response tokens
  active: Array  # bool[B]
  done: Array  # bool[B], ended by a stop token
  fault: Array  # bool[B], ended by logits that are not finite
  keys: Array  # key[B]
  forced: Array  # i32[B, F]
  forced_length: Array  # i32[B]
  rules: tuple  # states of the chain


@functools.partial(jax.jit, static_argnames=('config', 'rows', 'size', 'prompt', 'settings',
                                             'forced'))
def empty(config: ModelConfig, key: Array, *, rows: int, size: int, prompt: int,
          settings: decode.Settings, forced: int = 0) -> Slots:
  """Slots of at most `size` tokens; `prompt` and `forced` are the rooms of prompts and prefixes."""
  width = settings.max_new_tokens
  zeros = jnp.zeros(rows, jnp.int32)
  layers = cache_lib.split(config, rows, size).layers
  return Slots(
    cache=cache_lib.Cache(tuple(cache_lib.offload(config, x) for x in layers), zeros, split=True),
    logits=jnp.zeros((rows, config.vocab)), tokens=jnp.zeros((rows, width), jnp.int32),
    logp=jnp.zeros((rows, width)),
    kept=jnp.zeros((rows, width)) if settings.filtered else None, length=zeros, limit=zeros,
    active=zeros > 0, done=zeros > 0, fault=zeros > 0,
    keys=rng.fold_each(key, zeros, zeros),
    forced=jnp.zeros((rows, forced), jnp.int32), forced_length=zeros,
    rules=rules.init(settings.chain, rules.Given(
      jnp.zeros((rows, prompt), jnp.int32), zeros, config.vocab, width)))


@functools.partial(jax.jit, static_argnames=('config', 'settings'))
def prefill(config: ModelConfig, params: Params, tokens: Array, length: Array, *,
             settings: decode.Settings):
  """(cache by layer, logits, first states of the rules) of prompts i32[P, L]."""
  cache, logits = decode.prefill(config, params, axes.constrain(tokens, 'batch', None), length)
  given = rules.Given(tokens, length, config.vocab, settings.max_new_tokens)
  layers = cache.layers if cache.split else cache_lib.unstack(config, cache.layers)
  return layers, logits, rules.init(settings.chain, given)


@functools.partial(jax.jit, static_argnames='config', donate_argnums=1)
def insert(config: ModelConfig, slots: Slots, key: Array, prefix, target: Array, source: Array,
           row) -> Slots:
  """Sample i of a prefill enters slot target[i] (B or more: nobody does) from prompt source[i].

  `prefix` = (layers, logits, rules) of the prefill; `row` = (length, request, sample, forced,
  forced_length) of each sample.
  """
  layers, logits, first = prefix
  length, request, sample, forced, forced_length = row

  def put(old, new):
    return old.at[target].set(new, mode='drop')

  held = tuple(cache_lib.enter(config, *pair, target, source)
               for pair in zip(slots.cache.layers, layers))
  cache = cache_lib.Cache(held, put(slots.cache.length, length), split=True)
  zero = jnp.zeros_like(length)
  blank = lambda old: put(old, jnp.zeros((len(length), *old.shape[1:]), old.dtype))
  return Slots(
    cache=cache, logits=put(slots.logits, logits[source]),
    tokens=blank(slots.tokens), logp=blank(slots.logp), kept=jax.tree.map(blank, slots.kept),
    length=put(slots.length, zero), limit=put(slots.limit, zero + slots.tokens.shape[1]),
    active=put(slots.active, zero == 0), done=put(slots.done, zero > 0),
    fault=put(slots.fault, zero > 0), keys=put(slots.keys, rng.fold_each(key, request, sample)),
    forced=put(slots.forced, forced), forced_length=put(slots.forced_length, forced_length),
    rules=jax.tree.map(lambda old, new: put(old, new[source]), slots.rules, first))


@functools.partial(jax.jit, static_argnames='config', donate_argnums=2)
def append(config: ModelConfig, params: Params, slots: Slots, held: Array, tokens: Array,
           length: Array) -> Slots:
  """Slot b keeps its first held[b] tokens and goes on with length[b] tokens of i32[B, C].

  Slots with length 0 stay as they are. A recurrence cannot be cut: held[b] is 0 or all of it. A
  token whose states are not finite makes the logits behind all later ones NaN.
  """
  if config.sparse is not None and tokens.shape[1] == 1:
    tokens = jnp.pad(tokens, ((0, 0), (0, 1)))  # a single column would be read as a drawn token
  fed = length > 0
  start = jnp.where(fed, held, slots.cache.length)
  layers = tuple(_forget(layer, fed & (held == 0)) for layer in slots.cache.layers)
  out = decoder.forward(
    config, params, tokens, cache=dataclasses.replace(slots.cache, layers=layers, length=start),
    segment_ids=masks.segments_from_lengths(length, tokens.shape[1]), want='hidden')
  last = jnp.take_along_axis(out.hidden, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
  used = jnp.arange(tokens.shape[1])[None] < length[:, None]
  broken = (jnp.any(used & ~jnp.all(jnp.isfinite(out.hidden), axis=-1), axis=1)
            | (held > 0) & jnp.any(jnp.isnan(slots.logits), axis=1))
  new = jnp.where(broken[:, None], jnp.nan, decoder.unembed(config, params, last))
  logits = jnp.where(fed[:, None], new, slots.logits)
  return dataclasses.replace(slots, cache=out.cache, logits=logits)


def _forget(layer, rows: Array):
  """States of a recurrence start anew; keys of a cache are not read beyond its length."""
  if not isinstance(layer, cache_lib.Recurrent):
    return layer
  return jax.tree.map(lambda x: jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), 0, x), layer)


@functools.partial(jax.jit, donate_argnums=0)
def copy(slots: Slots, source: Array, target: Array) -> Slots:
  """Slot target[i] (B or more: none) holds what slot source[i] holds: its tokens and logits."""
  put = lambda x: x.at[target].set(x[source], mode='drop')
  return dataclasses.replace(slots, cache=jax.tree.map(put, slots.cache), logits=put(slots.logits))


@functools.partial(jax.jit, static_argnames=('config', 'settings'), donate_argnums=1)
def start(config: ModelConfig, slots: Slots, key: Array, here: Array, row, *,
          settings: decode.Settings) -> Slots:
  """Slots where here[b] begin to draw; `row` = (tokens i32[B, L], length, request, sample, limit)
  of what they hold and what they draw."""
  tokens, length, request, sample, limit = row
  fresh = empty(config, key, rows=len(length), size=1, prompt=tokens.shape[1], settings=settings)
  states = rules.init(settings.chain, rules.Given(tokens, length, config.vocab,
                                                  settings.max_new_tokens))
  fresh = dataclasses.replace(fresh, active=length > 0, limit=limit, rules=states,
                              keys=rng.fold_each(key, request, sample))
  pick = lambda new, old: jnp.where(here.reshape(-1, *(1,) * (old.ndim - 1)), new, old)
  kept = dict(cache=(), logits=())  # what the rows hold already
  found = jax.tree.map(pick, dataclasses.replace(fresh, **kept), dataclasses.replace(slots, **kept))
  return dataclasses.replace(found, cache=slots.cache, logits=slots.logits)


@functools.partial(jax.jit, static_argnames=('config', 'most', 'settings'), donate_argnums=2)
def steps(config: ModelConfig, params: Params, slots: Slots, *, most: int,
          settings: decode.Settings):
  """(slots after at most `most` tokens each, steps taken, tokens decoded); `params` are split."""
  eos = jnp.asarray(settings.eos_ids, jnp.int32)
  column = jnp.arange(settings.max_new_tokens)[None]

  def body(carry):
    s, taken, count = carry
    token, logp, kept = decode.force(
      decode.choose(s.logits, rng.fold_each(s.keys, s.length), s.length, settings, s.rules),
      s.forced, s.forced_length, s.length)
    live = s.active & decode.is_finite(logp, kept)
    here = (column == s.length[:, None]) & live[:, None]
    stopped = live & jnp.any(token[:, None] == eos, axis=1)
    out = decoder.forward(config, params, token[:, None], cache=s.cache, want='hidden',
                          segment_ids=live[:, None].astype(jnp.int32))
    length = s.length + live
    write = lambda old, new: jnp.where(here, new[:, None], old)
    logits = decoder.unembed(config, params, out.hidden[:, 0])
    return Slots(
      cache=out.cache, logits=jnp.where(live[:, None], logits, s.logits),
      tokens=write(s.tokens, token), logp=write(s.logp, logp),
      kept=jax.tree.map(write, s.kept, kept), length=length, limit=s.limit,
      active=live & ~stopped & (length < s.limit), done=s.done | stopped,
      fault=s.fault | (s.active & ~live), keys=s.keys, forced=s.forced,
      forced_length=s.forced_length,
      rules=rules.update(settings.chain, s.rules, token, s.length, live)), taken + 1, (
        count + jnp.sum(live, dtype=jnp.int32))

  def go_on(carry):
    return (carry[1] < most) & jnp.any(carry[0].active)

  return jax.lax.while_loop(go_on, body, (slots, jnp.int32(0), jnp.int32(0)))


@functools.partial(jax.jit, donate_argnums=0)
def release(slots: Slots, stay: Array) -> Slots:
  """Slots outside `stay` decode no more."""
  return dataclasses.replace(slots, active=slots.active & stay)


@jax.jit
def traffic(slots: Slots) -> Array | None:
  """i32[B, 4] of `cache.traffic`."""
  return cache_lib.traffic(slots.cache)


split_blocks = jax.jit(decoder.split_blocks, static_argnums=0)
