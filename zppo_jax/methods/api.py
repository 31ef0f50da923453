"""The record `Method`: which sequences, what each token is worth, which terms read that worth.

A step runs `plan` -> sampling and rewards -> `explore` -> scoring -> `credit` -> the train step ->
`absorb`. Everything but plan and explore is jitted; the train step never sees a method's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from zppo_jax.core import types

Array = jax.Array
PLAIN = 0  # kind of a group whose prompt is the question itself


@dataclasses.dataclass(frozen=True)
class Group:
  """One group of samples to draw (host side).

  `messages` replaces the plain question; `forced` ids open every response and are not trained on;
  with `response` ids nothing is sampled: the group is that one row, all of it in the loss but what
  `others_said` marks.
  """

  question: int
  kind: int = PLAIN
  messages: tuple[types.Message, ...] | None = None
  forced: tuple[int, ...] = ()
  response: tuple[int, ...] | None = None
  others_said: tuple[bool, ...] = ()  # per id of `response`; empty = nothing


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Groups with their sampled, graded rows; padding slots have group None and invalid rows."""

  rollout: types.Rollout
  groups: tuple[Group | None, ...]  # P slots, `group_size` rows each
  group_size: int
  texts: tuple[str, ...]  # N responses, '' on padding
  answers: tuple[str | None, ...]  # N parsed answers
  reward: np.ndarray  # f32[N], as in the rollout

  def rows(self, slot: int) -> range:
    """Row numbers of a slot."""
    return range(slot * self.group_size, (slot + 1) * self.group_size)

  def accuracy(self) -> np.ndarray:
    """Mean reward per slot, f32[P]; NaN on padding slots."""
    mean = self.reward.reshape(-1, self.group_size).mean(1)
    return np.where([g is not None for g in self.groups], mean, np.nan)


class Context(Protocol):
  """What plan and explore may ask of the run."""

  step: int

  def key(self, *names) -> Array:
    """Key at this step's address."""

  def rng(self, *names) -> np.random.Generator:
    """Host generator at this step's address."""

  def example(self, question: int) -> types.Example:
    """The question in that row of the task source."""

  def distractor(self, question: int) -> str:
    """A plausible wrong answer to a question."""

  def others(self, question: int, count: int, rng: np.random.Generator) -> list[int]:
    """Random other questions of the source."""

  def next_questions(self, count: int) -> np.ndarray:
    """More question ids from the loader, i32[count]."""

  def encode(self, text: str) -> tuple[int, ...]:
    """Token ids of ordinary text: never special ones."""

  def worked(self, question: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """(ids, what others said) of the worked dialogue of a question; the last stop is left out."""

  def draw(self, groups: Sequence[Group], *, capacity: int, first_id: int = 0,
           group_size: int | None = None, role: int = types.POLICY, greedy: bool = False,
           reformulated: bool = False, forced_tokens: int = 0) -> Drawn:
    """Samples and grades groups in `capacity` static slots; group ids start at `first_id`.

    `reformulated` takes the long prompt bucket; `forced_tokens` is the static room for prefixes.
    """

  def fits(self, group: Group, *, reformulated: bool = False) -> bool:
    """Whether the group's prompt has room in the bucket that `draw` would take."""

  def decode(self, ids: Sequence[int]) -> str:
    """Text of token ids."""

  def count(self, name: str, numerator: float, denominator: float) -> None:
    """Adds a ratio to this step's metrics."""

  def write(self, prompts: Sequence[str], *, max_tokens: int, tag: str) -> list[str]:
    """Greedy answers of the frozen teacher to instructions."""


@types.record
class RoleOutputs:
  """A frozen role on the same rows: enough for any divergence, without logits."""

  hidden: Array  # [N, W, D]
  unembedding: Array  # [D, V]
  logit_cap: float | None = types.static(default=None)


@types.record
class Outputs:
  """What a term may read of the models; zero outside the loss mask where per token."""

  logp: Array  # f32[N, T]
  entropy: Array  # f32[N, T]
  hidden: Array  # [N, W, D], states that predict the window from column `start` on
  unembedding: Array  # [D, V]
  start: Array  # i32[N]
  taps: dict[str, Array]
  value: Array | None
  roles: dict[str, RoleOutputs]
  logit_cap: float | None = types.static(default=None)  # of the policy's logits


# term(outputs, signal) -> (numerator, denominator, {metric: (numerator, denominator)}). All of them
# add up over micro-batches and shards; the denominator depends on the signal alone. Metrics whose
# name ends in '_max' are (value, unused) and reduce by maximum.
Metrics = dict[str, tuple[Array, Array]]
Term = Callable[[Outputs, types.Signal], tuple[Array, Array, Metrics]]


def no_state(key: Array) -> Any:
  """Init of a method without state."""
  del key
  return ()


def keep_drawn(state, drawn: Drawn, ctx: Context):
  """Explore of a method without a second phase."""
  del ctx
  return state, [drawn]


def keep_state(state, rollout: types.Rollout):
  """Absorb of a method that learns nothing beyond its parameters."""
  del rollout
  return state


def no_summary(state) -> dict[str, Any]:
  del state
  return {}


@dataclasses.dataclass(frozen=True)
class Slots:
  """Static size of a part that `explore` adds: group slots, rows per group, prompt bucket."""

  capacity: int
  group_size: int
  reformulated: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
  """A training method as a value; `dataclasses.replace` composes two of them.

  plan(state, question ids i32[num_new], ctx) -> (state, groups)      host
  explore(state, drawn, ctx) -> (state, [drawn, ...])                 host, the second phase
  credit(state, rollout, scores) -> (state, signal)                   jitted, all parts as one
  absorb(state, rollout) -> state                                     jitted, after the update
  summary(state) -> {metric: scalar}                                  jitted
  `capacity` counts the group slots of the first phase. `needs` names roles and features among
  'old_logp', 'reference', 'teacher_logp', 'teacher_hidden', 'critic', 'teacher' (text), 'solutions'
  (given responses, which must fit their bucket), 'fresh_explore' (credit reads what the explore of
  the same batch left in the state: no other batch may be sampled in between).
  """

  plan: Callable
  credit: Callable
  terms: tuple[Term, ...]
  group_size: int
  capacity: int
  iterations: int = 1  # optimiser steps per rollout step
  extra: tuple[Slots, ...] = ()  # parts of the second phase, in order
  init: Callable = no_state
  explore: Callable = keep_drawn
  absorb: Callable = keep_state
  summary: Callable = no_summary
  needs: frozenset[str] = frozenset()
