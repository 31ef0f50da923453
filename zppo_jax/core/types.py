"""The records that every layer passes around. Dims: N rows, T tokens per row, P groups."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

Array = jax.Array

# Rollout.status: ended by a stop token, by length, by turns, by a fault outside the policy, by
# output that could not be read, or by logits that are not finite
FINISHED, TRUNCATED, OUT_OF_TURNS, ENV_FAILURE, INVALID_OUTPUT, NONFINITE = 0, 1, 2, 3, 4, 5
POLICY, TEACHER = 0, 1  # Rollout.role_id: who wrote the loss tokens (given data counts as teacher)


@dataclasses.dataclass(frozen=True)
class ToolCall:
  """One call that an assistant asks for."""

  id: str
  name: str
  arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ToolSpec:
  """What an assistant is told about a tool; `parameters` is a JSON schema of type object."""

  name: str
  description: str
  parameters: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Message:
  """One chat turn; `role` is 'system', 'user', 'assistant' or 'tool'.

  `tool_calls` are those that `content` asks for, already read; `tool_call_id` and `name` say which
  call a tool answers.
  """

  role: str
  content: str
  tool_calls: tuple[ToolCall, ...] = ()
  tool_call_id: str | None = None
  name: str | None = None


@dataclasses.dataclass(frozen=True)
class Example:
  """One verifiable question, as the data layer yields it (host side, no arrays).

  `uid` is a content hash, never a row number; `verifier` names a row of
  `zppo_jax.rewards.verifiers.VERIFIERS`; `solution` is a worked trace for SFT, without
  special tokens. `dialogue` is a worked trace of several turns (answers with `tool_calls`, answers
  of tools), in its place.
  """

  uid: str
  messages: tuple[Message, ...]
  answer: str
  verifier: str = 'math'
  verifier_args: dict[str, Any] = dataclasses.field(default_factory=dict)
  meta: dict[str, Any] = dataclasses.field(default_factory=dict)
  solution: str | None = None
  dialogue: tuple[Message, ...] = ()


def record(cls):
  """Frozen dataclass registered as a pytree; fields marked `static()` are metadata."""
  cls = dataclasses.dataclass(frozen=True)(cls)
  fields = dataclasses.fields(cls)
  meta = [f.name for f in fields if f.metadata.get('static')]
  data = [f.name for f in fields if not f.metadata.get('static')]
  return jax.tree_util.register_dataclass(cls, data, meta)


def static(**kwargs):
  """A dataclass field that is part of the tree structure, not a leaf."""
  return dataclasses.field(metadata={'static': True}, **kwargs)


@record
class Rollout:
  """Sampled rows: prompt, then response, then padding; token t is predicted from tokens < t.

  A group is keyed by its own `group_id`, never by its prompt. One trajectory may fill several rows
  (equal `traj_id`); `traj_tokens` is its total number of loss tokens and the denominator of
  sequence means. All masks are explicit; no id value means padding.
  """

  tokens: Array  # i32[N, T]
  segment_ids: Array  # i32[N, T], 0 = padding
  positions: Array  # i32[N, T]
  loss_mask: Array  # bool[N, T], true where the policy (or `role_id`) wrote the token
  behavior_logp: Array  # f32[N, T], nats under the sampling distribution, 0 outside loss_mask
  version: Array  # i32[N, T], policy version that wrote the token
  turn_id: Array  # i32[N, T], 0 = prompt
  group_id: Array  # i32[N]
  traj_id: Array  # i32[N]
  traj_tokens: Array  # f32[N]
  role_id: Array  # i32[N]
  kind: Array  # i32[N], meaning given by the method (0 = plain)
  question_id: Array  # i32[N], row of the task source, -1 = none
  reward: Array  # f32[N]
  status: Array  # i32[N]
  valid: Array  # bool[N]; false = padding row, outside every mean
  # f32[N, T]: log softmax(z / T)[token] = behavior_logp + log_kept_mass; None = sampled unfiltered
  log_kept_mass: Array | None = None
  # f32[N], of the blocks of keys in host memory that the steps of a row wanted: the share that was
  # on the device, and the share that had not come when it was to be read; None = no such keys
  pool_hits: Array | None = None
  pool_absent: Array | None = None


@record
class Scores:
  """What the scorer adds to a rollout; a role that the method does not need stays None."""

  old_logp: Array | None = None  # f32[N, T], policy before the update
  entropy: Array | None = None  # f32[N, T], nats
  ref_logp: Array | None = None  # f32[N, T], reference policy
  teacher_logp: Array | None = None  # f32[N, T], teacher, on the sampled tokens
  value: Array | None = None  # f32[N, T], critic before the update, at the state before token t
  minibatch: Array | None = None  # i32[N], the mini-batch that each row will be in


@record
class Signal:
  """What each token is worth. Everything here is data: no gradient flows into it.

  `token_weight` and `is_weight` are separate hooks: both multiply the loss outside any clip.
  A mini-batch whose rows are all inactive leaves parameters and optimiser untouched.
  """

  mask: Array  # bool[N, T], tokens in the loss
  advantage: Array  # f32[N, T], zero outside the mask
  active: Array  # bool[N], rows that carry signal
  traj_tokens: Array  # f32[N]
  old_logp: Array | None = None  # f32[N, T]; None = on-policy: the term uses stop_gradient(logp)
  token_weight: Array | None = None  # f32[N, T]
  is_weight: Array | None = None  # f32[N, T]
  ref_logp: Array | None = None  # f32[N, T]
  returns: Array | None = None  # f32[N, T], critic targets
  old_value: Array | None = None  # f32[N, T]
