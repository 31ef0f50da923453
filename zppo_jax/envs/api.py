"""The protocol of a text environment. Host code, deterministic in (task, seed, actions)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, Self

from zppo_jax.core import types


@dataclasses.dataclass(frozen=True)
class Task:
  """One episode to play: `uid` is stable across runs, `args` are what the environment reads."""

  uid: str
  args: dict[str, Any] = dataclasses.field(default_factory=dict)
  group: str = ''  # tasks of one family, e.g. one goal type


@dataclasses.dataclass(frozen=True)
class Observation:
  """What the policy sees. `admissible` lists every action that would work, if it is known."""

  text: str
  admissible: tuple[str, ...] | None = None
  info: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StepResult:
  """`progress` in [0, 1] is the share of sub-goals that hold, None where there are none."""

  observation: Observation
  reward: float
  done: bool
  progress: float | None = None
  info: dict[str, Any] = dataclasses.field(default_factory=dict)


class TextEnv(Protocol):
  """One episode at a time. `step` never raises on an action, however malformed: it says so."""

  def reset(self, task: Task, seed: int) -> Observation: ...

  def step(self, action: str | Sequence[types.ToolCall]) -> StepResult: ...

  def close(self) -> None: ...


class Cloneable(Protocol):
  """Environments that can be copied in the middle of an episode."""

  def clone(self) -> Self: ...
