"""Conversations as graphs of tokens, written while they happen, and the rows made of them.

A node holds only the tokens that it adds. An answer keeps the ids that were sampled; what others
say is tokenised once, when it is said. A history that is rewritten opens a new root. So a training
row is one unbroken path from a root to a leaf, token for token what the model saw.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from zppo_jax.agents.records import Completion, Episode, Node, Status, Trace
from zppo_jax.core import types


class Renderer(Protocol):
  """Turns messages into tokens; see `data.templates`."""

  stop_id: int  # closes an answer

  def open(self, messages: Sequence[types.Message]) -> Sequence[int]:
    """A whole chat, up to where the next answer begins."""

  def turn(self, messages: Sequence[types.Message]) -> Sequence[int]:
    """What follows an answer that ended by itself, up to where the next one begins."""


def path(nodes: Sequence[Node], leaf: int | None) -> list[int]:
  """Node numbers from the root to a leaf."""
  found = []
  while leaf is not None:
    found.append(leaf)
    leaf = nodes[leaf].parent
  return found[::-1]


def _same(a: types.Message, b: types.Message) -> bool:
  return (a.role, a.content) == (b.role, b.content)


class Recorder:
  """Writes one role's trace; without a renderer its nodes have no tokens."""

  def __init__(self, role: str, renderer: Renderer | None, trainable: bool):
    self._role, self._renderer, self._trainable = role, renderer, trainable
    self._nodes: list[Node] = []
    self._ends: dict[int, tuple[types.Message, ...]] = {}  # answers that ended by themselves
    self._asked: tuple[int, tuple[types.Message, ...]] | None = None

  def ask(self, messages: Sequence[types.Message], *, turn: int, segment: str) -> tuple[int, ...]:
    """Notes that the model is asked to go on from a chat; returns the exact prompt ids."""
    messages = tuple(messages)
    parent = max((i for i, said in self._ends.items() if len(said) < len(messages)
                  and all(map(_same, said, messages))), default=None,
                 key=lambda i: len(self._ends[i]))
    new = messages[len(self._ends.get(parent, ())):]
    ids: tuple[int, ...] = ()
    if self._renderer is not None:
      ids = tuple(self._renderer.open(new) if parent is None else self._turn(parent, new))
    self._nodes.append(Node(parent, new, ids, (False,) * len(ids), (0.0,) * len(ids), turn=turn,
                            segment=segment))
    self._asked = len(self._nodes) - 1, messages
    return self.tokens(len(self._nodes) - 1)

  def _turn(self, parent: int, new: tuple[types.Message, ...]) -> Sequence[int]:
    """What follows an answer; a stop string or a tool's end has left it open."""
    said, stop = self._nodes[parent].token_ids, self._renderer.stop_id
    return (*(() if said[-1:] == (stop,) else (stop,)), *self._renderer.turn(new))

  def answer(self, completion: Completion) -> types.Message:
    """Notes what the model said to the last `ask`; returns it as a message."""
    parent, messages = self._asked
    message = types.Message('assistant', completion.text, completion.tool_calls)
    ids = completion.token_ids or ()
    asked = self._nodes[parent]
    self._nodes.append(Node(
      parent, (message,), ids, (True,) * len(ids), completion.logprobs or (0.0,) * len(ids),
      completion.version or 0, True, asked.turn, asked.segment))
    if completion.finish in ('stop', 'tool'):
      self._ends[len(self._nodes) - 1] = (*messages, message)
    self._asked = None
    return message

  def forget(self) -> None:
    """Takes the last `ask` back: no answer came."""
    self._nodes.pop()
    self._asked = None

  def tokens(self, leaf: int) -> tuple[int, ...]:
    return tuple(t for i in path(self._nodes, leaf) for t in self._nodes[i].token_ids)

  def trace(self) -> Trace:
    return Trace(tuple(self._nodes), self._role, self._trainable)


@dataclasses.dataclass(frozen=True)
class Row:
  """One path as arrays of equal length; `start` is where its first answer begins."""

  tokens: np.ndarray  # i32[n]
  loss_mask: np.ndarray  # bool[n]
  logp: np.ndarray  # f32[n]
  version: np.ndarray  # i32[n]
  turn: np.ndarray  # i32[n], 0 = before the first answer
  start: int


def rows(trace: Trace) -> list[Row]:
  """A row per path that holds sampled tokens; a node on several paths is trained on in the first.

  Raises ValueError on a node whose tokens, mask and log-probs differ in number.
  """
  parents = {n.parent for n in trace.nodes}
  leaves = [i for i in range(len(trace.nodes)) if i not in parents]
  found, trained = [], set()
  for leaf in leaves:
    numbers = path(trace.nodes, leaf)
    if not any(trace.nodes[i].sampled and trace.nodes[i].token_ids for i in numbers):
      continue
    found.append(_row([trace.nodes[i] for i in numbers], [i not in trained for i in numbers]))
    trained |= set(numbers)
  return found


def _row(nodes: Sequence[Node], fresh: Sequence[bool]) -> Row:
  for i, n in enumerate(nodes):
    if not len(n.token_ids) == len(n.loss_mask) == len(n.logprobs):
      raise ValueError(f'node {i} of a path has {len(n.token_ids)} tokens, {len(n.loss_mask)} mask '
                       f'entries and {len(n.logprobs)} log-probs')
    if any(n.loss_mask) and not n.sampled:
      raise ValueError(f'node {i} of a path was not sampled, but is in the loss')

  def joined(values: Iterable[Sequence], dtype) -> np.ndarray:
    return np.concatenate([np.asarray(v, dtype) for v in values])

  mask = joined(([m and f for m in n.loss_mask] for n, f in zip(nodes, fresh)), bool)
  start = sum(len(n.token_ids) for n in nodes[:next(i for i, n in enumerate(nodes) if n.sampled)])
  turn = joined(([n.turn + 1] * len(n.token_ids) for n in nodes), np.int32)
  turn[:start] = 0
  keep = lambda x: np.where(mask, x, 0)
  return Row(joined((n.token_ids for n in nodes), np.int32), mask,
             keep(joined((n.logprobs for n in nodes), np.float32)),
             keep(joined(([n.version] * len(n.token_ids) for n in nodes), np.int32)), turn, start)


STATUS = {Status.MAX_TOKENS: types.TRUNCATED, Status.MAX_TURNS: types.OUT_OF_TURNS,
          Status.INVALID_OUTPUT: types.INVALID_OUTPUT, Status.TIMEOUT: types.ENV_FAILURE,
          Status.ENV_ERROR: types.ENV_FAILURE, Status.MODEL_ERROR: types.ENV_FAILURE}


def pack(parts: Sequence[Sequence[Row]], *, size: int, count: int, status: Sequence[int],
         reward: Sequence[float], group_id: Sequence[int], kind: Sequence[int],
         question_id: Sequence[int], first_traj: int = 0) -> types.Rollout:
  """Rollout of `count` rows of `size` columns on the host: trajectory i has the rows parts[i].

  Everything else has an entry per trajectory. One without rows takes up one invalid row. Raises
  ValueError on a row that is too long, or on too many rows.
  """
  owner = [i for i, part in enumerate(parts) for _ in range(max(1, len(part)))]
  if len(owner) > count:
    raise ValueError(f'{len(owner)} rows do not fit into count = {count}')
  flat = [row for part in parts for row in (part or [None])]
  arrays = {name: np.zeros((count, size), dtype) for name, dtype in (
    ('tokens', np.int32), ('loss_mask', bool), ('logp', np.float32), ('version', np.int32),
    ('turn', np.int32))}
  length = np.zeros(count, np.int32)
  for i, row in enumerate(flat):
    if row is None:
      continue
    if len(row.tokens) > size:
      raise ValueError(f'a row of {len(row.tokens)} tokens does not fit into size = {size}')
    length[i] = len(row.tokens)
    for name, array in arrays.items():
      array[i, :length[i]] = getattr(row, name)
  column = np.arange(size)[None]
  inside = column < length[:, None]
  traj = np.asarray([*owner, *range(len(parts), len(parts) + count - len(owner))], np.int32)
  lost = np.bincount(traj, arrays['loss_mask'].sum(1), minlength=len(parts) + count)

  def of(values, blank, dtype):
    return np.asarray([*(values[i] for i in owner), *[blank] * (count - len(owner))], dtype)

  return types.Rollout(
    tokens=arrays['tokens'], segment_ids=inside.astype(np.int32),
    positions=np.where(inside, column, 0).astype(np.int32), loss_mask=arrays['loss_mask'],
    behavior_logp=arrays['logp'], version=arrays['version'], turn_id=arrays['turn'],
    group_id=of(group_id, 0, np.int32), traj_id=traj + np.int32(first_traj),
    traj_tokens=lost[traj].astype(np.float32),
    role_id=np.zeros(count, np.int32), kind=of(kind, 0, np.int32),
    question_id=of(question_id, -1, np.int32), reward=of(reward, 0, np.float32),
    status=of(status, 0, np.int32), valid=length > 0)


def to_json(episode: Episode) -> str:
  """One line; `from_json` reads it back, equal in every field."""
  return json.dumps(dataclasses.asdict(episode) | dict(status=episode.status.value))


def from_json(line: str) -> Episode:
  raw = json.loads(line)

  def message(m: dict[str, Any]) -> types.Message:
    return types.Message(**m | dict(tool_calls=tuple(types.ToolCall(**c)
                                                     for c in m['tool_calls'])))

  def node(n: dict[str, Any]) -> Node:
    tuples = {k: tuple(n[k]) for k in ('token_ids', 'loss_mask', 'logprobs')}
    return Node(**n | tuples | dict(messages=tuple(map(message, n['messages']))))

  parts = tuple(Trace(**t | dict(nodes=tuple(map(node, t['nodes'])))) for t in raw['traces'])
  return Episode(**raw | dict(traces=parts, status=Status(raw['status'])))
