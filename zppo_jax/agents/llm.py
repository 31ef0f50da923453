"""One protocol for language models, and the client that needs none: scripted replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from zppo_jax.agents.records import Completion, GenRequest, ScoreRequest, TokenScores


class Unsupported(NotImplementedError):
  """The client cannot do what was asked; `capabilities` says what it can."""


class LMClient(Protocol):
  """A batch of requests in, answers in the same order out; `n` answers per request, one by one.

  `capabilities` are among 'tokens', 'logprobs', 'score', 'train', 'json', 'tools'. A request that
  fails yields completions with finish 'error' and leaves the others alone.
  """

  capabilities: frozenset[str]

  def generate(self, requests: Sequence[GenRequest]) -> list[Completion]: ...

  def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]: ...


class ScriptedClient:
  """Replies by a function of the request: deterministic, so evidence about a mechanism, never
  about language models."""

  capabilities: frozenset[str] = frozenset()

  def __init__(self, reply: Callable[[GenRequest], str]):
    self._reply = reply

  def generate(self, requests: Sequence[GenRequest]) -> list[Completion]:
    return [Completion(self._reply(r), 'stop') for r in requests for _ in range(r.n)]

  def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
    raise Unsupported('a scripted client has no probabilities')


def transcript(replies: Sequence[str]) -> ScriptedClient:
  """Gives the replies in their order; IndexError behind the last one."""
  left = iter(replies)

  def reply(request: GenRequest) -> str:
    del request
    try:
      return next(left)
    except StopIteration:
      raise IndexError(f'the transcript has {len(replies)} replies, one more was asked for'
                       ) from None

  return ScriptedClient(reply)
