"""Logit rules: what is done to logits f32[N, V] before a token is drawn.

A rule is three pure functions that run inside the decode loop, for all rows at once; a row never
sees another. Builders are cached, so that equal rules are one static argument of the programs. The
order of a chain is: `Settings.rules` as given, penalties, temperature, top-k, top-p, min-p. A rule
at its neutral setting is the identity, bit for bit, and costs nothing: it is left out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zppo_jax.core import types

Array = jax.Array
DROPPED = -1e30


@types.record
class Given:
  """What a rule may read before the first token: prompts i32[N, L] with i32[N] tokens each."""

  tokens: Array
  length: Array
  vocab: int = types.static()
  max_new_tokens: int = types.static()


def no_state(given: Given) -> Any:
  del given
  return ()


def keep_state(state, token: Array, step: Array, live: Array):
  del token, step, live
  return state


@dataclasses.dataclass(frozen=True)
class LogitRule:
  """init(Given) -> state of N leading rows; apply(state, logits f32[N, V], step i32[N]) -> logits;
  update(state, token i32[N], step i32[N], live bool[N]) -> state, unchanged where not live.

  `step` counts the response tokens before this one.
  """

  name: str
  apply: Callable
  init: Callable = no_state
  update: Callable = keep_state


def _check(name: str, fine: bool, bound: str, value) -> None:
  if not fine:
    raise ValueError(f'{name} must be {bound}, got {value}')


@functools.cache
def temperature(value: float) -> LogitRule:
  """z / value."""
  _check('temperature', value > 0, 'above 0', value)
  return LogitRule('temperature', lambda state, z, step: z / value)


@functools.cache
def top_k(k: int) -> LogitRule:
  """Drops everything below the k-th largest logit, which keeps its ties; k = 0 keeps all."""
  _check('top_k', k >= 0, 'at least 0', k)

  def apply(state, z, step):
    if not k or k >= z.shape[-1]:
      return z
    kth = jax.lax.top_k(z, k)[0][..., -1:]
    return jnp.where(z >= kth, z, DROPPED)

  return LogitRule('top_k', apply)


@functools.cache
def top_p(p: float) -> LogitRule:
  """Keeps the tokens whose strictly better ones hold less than p; p = 1 keeps all."""
  _check('top_p', 0 < p <= 1, 'in (0, 1]', p)

  def apply(state, z, step):
    if p >= 1:
      return z
    order = jnp.argsort(z, axis=-1, descending=True)
    probs = jax.nn.softmax(jnp.take_along_axis(z, order, axis=-1), axis=-1)
    keep_sorted = jnp.cumsum(probs, axis=-1) - probs < p
    keep = jnp.take_along_axis(keep_sorted, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, z, DROPPED)

  return LogitRule('top_p', apply)


@functools.cache
def min_p(p: float) -> LogitRule:
  """Drops tokens less likely than p times the best one; p = 0 keeps all."""
  _check('min_p', 0 <= p < 1, 'in [0, 1)', p)

  def apply(state, z, step):
    if not p:
      return z
    return jnp.where(z >= jnp.max(z, axis=-1, keepdims=True) + math.log(p), z, DROPPED)

  return LogitRule('min_p', apply)


@functools.cache
def penalties(presence: float = 0.0, frequency: float = 0.0, repetition: float = 1.0) -> LogitRule:
  """Discourages tokens that the row holds already; 0, 0 and 1 change nothing.

  z / repetition for z > 0, else z * repetition, for tokens of the prompt or the response, then
  z - frequency * count - presence * [count > 0] with the count in the response.
  """
  _check('presence', math.isfinite(presence), 'finite', presence)
  _check('frequency', math.isfinite(frequency), 'finite', frequency)
  _check('repetition', 0 < repetition < math.inf, 'above 0 and finite', repetition)

  def init(given: Given):
    rows, size = given.tokens.shape
    inside = jnp.arange(size)[None] < given.length[:, None]
    seen = jnp.zeros((rows, given.vocab), bool)
    return (jnp.zeros((rows, given.vocab), jnp.int32),
            seen.at[jnp.arange(rows)[:, None], given.tokens].max(inside))

  def apply(state, z, step):
    counts, prompt = state
    turned = jnp.where(z > 0, z / repetition, z * repetition)
    z = jnp.where((counts > 0) | prompt, turned, z)
    return z - frequency * counts - presence * (counts > 0)

  def update(state, token, step, live):
    counts, prompt = state
    return counts.at[jnp.arange(len(token)), token].add(live.astype(jnp.int32)), prompt

  return LogitRule('penalties', apply, init, update)


@functools.cache
def bias(amounts: tuple[tuple[int, float], ...]) -> LogitRule:
  """z[id] + amount for each (id, amount)."""
  _check('bias', all(i >= 0 and math.isfinite(a) for i, a in amounts),
         'pairs of an id of at least 0 and a finite amount', amounts)
  ids, values = (np.asarray(x, t) for x, t in zip(
    (tuple(zip(*amounts)) or ((), ())), (np.int32, np.float32)))
  return LogitRule('bias', lambda state, z, step: z.at[:, ids].add(values))


@functools.cache
def forbid(ids: tuple[int, ...], below: int | None = None) -> LogitRule:
  """Drops the ids, in the whole response or before its token number `below` (a least length)."""
  _check('forbid', all(i >= 0 for i in ids), 'ids of at least 0', ids)
  where = np.asarray(ids, np.int32)

  def apply(state, z, step):
    dropped = z.at[:, where].set(DROPPED)
    return dropped if below is None else jnp.where((step < below)[:, None], dropped, z)

  return LogitRule('forbid', apply)


@functools.cache
def no_repeats(size: int) -> LogitRule:
  """Drops tokens that would repeat a run of `size` tokens of the response."""
  _check('no_repeats', size >= 1, 'at least 1', size)

  def init(given: Given):
    return jnp.full((given.tokens.shape[0], given.max_new_tokens), -1, jnp.int32)

  def apply(state, z, step):
    rows, width = state.shape
    column = jnp.arange(width)[None]
    same = column >= size - 1
    for back in range(1, size):  # token i - back of the past against the last `back`-th
      last = jnp.take_along_axis(state, jnp.maximum(step - back, 0)[:, None], axis=1)
      same &= jnp.roll(state, back, axis=1) == last
    ends = same & (column < step[:, None]) & (step[:, None] >= size - 1)
    banned = jnp.zeros(z.shape, bool).at[jnp.arange(rows)[:, None], jnp.maximum(state, 0)].max(ends)
    return jnp.where(banned, DROPPED, z)

  def update(state, token, step, live):
    at = jnp.where(live, step, state.shape[1])
    return state.at[jnp.arange(len(token)), at].set(token, mode='drop')

  return LogitRule('no_repeats', apply, init, update)


@functools.cache
def automaton(classes: tuple[int, ...], table: tuple[tuple[int, ...], ...]) -> LogitRule:
  """Allows what a finite automaton allows: table[state][class of the token] = next state, -1 = not
  allowed. State 0 is the first; `classes` holds the class of each id of the vocabulary."""
  width = max(classes, default=-1) + 1
  _check('automaton', min(classes, default=-1) >= 0 and all(len(r) == width for r in table),
         f'a row of {width} next states per state', [len(r) for r in table])
  _check('automaton', all(-1 <= s < len(table) and max(r) >= 0 for r in table for s in r),
         f'next states in -1 .. {len(table) - 1}, one allowed in each row', table)
  kind, follow = np.asarray(classes, np.int32), np.asarray(table, np.int32)

  def apply(state, z, step):
    if z.shape[-1] < len(classes):
      raise ValueError(f'automaton: {len(classes)} classes for a vocabulary of {z.shape[-1]}')
    allowed = jnp.asarray(follow >= 0)[state][:, kind]
    known = jnp.where(allowed, z[:, :len(classes)], DROPPED)
    return jnp.full_like(z, DROPPED).at[:, :len(classes)].set(known)

  def update(state, token, step, live):
    after = jnp.asarray(follow)[state, jnp.asarray(kind)[jnp.minimum(token, len(classes) - 1)]]
    return jnp.where(live & (after >= 0), after, state)

  return LogitRule('automaton', apply, lambda given: jnp.zeros(given.tokens.shape[0], jnp.int32),
                   update)


LOGIT_RULES = {
  'temperature': temperature, 'top_k': top_k, 'top_p': top_p, 'min_p': min_p,
  'penalties': penalties, 'bias': bias, 'forbid': forbid, 'no_repeats': no_repeats,
  'automaton': automaton}


def init(chain: Sequence[LogitRule], given: Given) -> tuple:
  return tuple(rule.init(given) for rule in chain)


def apply(chain: Sequence[LogitRule], states: tuple, logits: Array, step: Array) -> Array:
  """The logits of the distribution that is sampled; raises ValueError naming a rule that returns
  another shape or type."""
  for rule, state in zip(chain, states):
    found = rule.apply(state, logits, step)
    if (found.shape, found.dtype) != (logits.shape, logits.dtype):
      raise ValueError(f'rule {rule.name!r} must return {logits.dtype}{list(logits.shape)}, '
                       f'got {found.dtype}{list(found.shape)}')
    logits = found
  return logits


def update(chain: Sequence[LogitRule], states: tuple, token: Array, step: Array, live: Array
           ) -> tuple:
  return tuple(rule.update(s, token, step, live) for rule, s in zip(chain, states))
