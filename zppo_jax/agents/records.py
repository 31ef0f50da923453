"""The records of an episode: requests to a model, completions, nodes and traces. Host side."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Literal

from zppo_jax.core import types

Finish = Literal['stop', 'length', 'tool', 'error']


class Status(enum.Enum):
  """How an episode ended. ENV_ERROR, TIMEOUT and MODEL_ERROR (`FAULTS`) are not the policy's doing:
  such an episode leaves the statistics of its group."""

  FINISHED = 'finished'  # the policy ended it, and nobody has judged yet
  SUCCEEDED = 'succeeded'
  FAILED = 'failed'
  MAX_TURNS = 'max_turns'
  MAX_TOKENS = 'max_tokens'
  TIMEOUT = 'timeout'
  ENV_ERROR = 'env_error'
  INVALID_OUTPUT = 'invalid_output'
  MODEL_ERROR = 'model_error'


FAULTS = frozenset({Status.TIMEOUT, Status.ENV_ERROR, Status.MODEL_ERROR})


@dataclasses.dataclass(frozen=True)
class GenRequest:
  """One prompt, as a chat or as exact token ids, and how to go on from it.

  `seed` names the noise: the same request gives the same answer, whatever else is asked.
  """

  messages: tuple[types.Message, ...] = ()
  token_ids: tuple[int, ...] | None = None  # the exact prompt, where the client takes tokens
  tools: tuple[types.ToolSpec, ...] = ()
  max_tokens: int = 256
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0  # 0 = all
  min_p: float = 0.0
  stop: tuple[str, ...] = ()
  seed: int | None = None
  n: int = 1


@dataclasses.dataclass(frozen=True)
class Usage:
  """Tokens that a completion took."""

  prompt: int
  completion: int


@dataclasses.dataclass(frozen=True)
class Completion:
  """One answer. Token ids and version come from an in-process policy only, log-probs are in nats.

  `token_ids` hold the stop token, if there was one. An answer that failed has finish 'error' and
  says why in `error`.
  """

  text: str
  finish: Finish
  token_ids: tuple[int, ...] | None = None
  logprobs: tuple[float, ...] | None = None
  prompt_token_ids: tuple[int, ...] | None = None
  version: int | None = None
  usage: Usage | None = None
  tool_calls: tuple[types.ToolCall, ...] = ()  # as a server that reads them itself returns them
  error: str = ''


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
  """Log-probs wanted of `token_ids` behind `prompt_token_ids`."""

  prompt_token_ids: tuple[int, ...]
  token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TokenScores:
  """Log-probs in nats, one per token."""

  logprobs: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Node:
  """What a conversation gets at once: messages of others, or one answer; `parent` None = a root.

  `loss_mask` is true on sampled tokens only; the three tuples are equally long, and empty where the
  model is not ours. `segment` says what the tokens do ('act', 'think', 'compress', ...), so that a
  loss may weigh them apart.
  """

  parent: int | None
  messages: tuple[types.Message, ...]
  token_ids: tuple[int, ...] = ()
  loss_mask: tuple[bool, ...] = ()
  logprobs: tuple[float, ...] = ()
  version: int = 0
  sampled: bool = False
  turn: int = 0
  segment: str = 'act'


@dataclasses.dataclass(frozen=True)
class Trace:
  """One role's part of an episode: a graph of nodes, each path from a root one conversation."""

  nodes: tuple[Node, ...] = ()
  role: str = 'policy'
  trainable: bool = False


@dataclasses.dataclass(frozen=True)
class Episode:
  """One attempt at a task."""

  task: str  # uid
  repetition: int
  status: Status
  traces: tuple[Trace, ...]
  reward: float = 0.0
  progress: float | None = None
  turns: int = 0
  text: str = ''  # the last answer
  info: dict[str, Any] = dataclasses.field(default_factory=dict)
