"""What about rollouts stays fixed during a run: the questions and how they are asked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from zppo_jax.agents import react
from zppo_jax.core import types
from zppo_jax.data import templates
from zppo_jax.models.config import ModelConfig, Sparse
from zppo_jax.sampling import decode
from zppo_jax.train import episodes


@dataclasses.dataclass(frozen=True)
class Questions:
  """A task source with its renderer; examples and plain prompts are cached."""

  source: Any
  tokenizer: Any
  template: str
  instruction: str = ''  # closes every question, plain or reformulated
  system: str = ''  # opens every chat
  parser: str = 'hermes'  # notation of tool calls

  @functools.cached_property
  def example(self):
    """example(row) -> Example."""
    return functools.lru_cache(maxsize=200_000)(self.source.__getitem__)

  @functools.cached_property
  def plain_ids(self):
    """plain_ids(row) -> token ids of the plain prompt."""
    return functools.lru_cache(maxsize=200_000)(lambda q: self.render(self.example(q).messages))

  @functools.cached_property
  def stop_id(self) -> int:
    return templates.stop_id(self.tokenizer, self.template)

  def instruct(self, messages: Sequence[types.Message]) -> tuple[types.Message, ...]:
    """The chat behind the system text, its last question followed by the instruction."""
    before = (types.Message('system', self.system),) if self.system else ()
    if not self.instruction:
      return *before, *messages
    last = messages[-1]
    closed = dataclasses.replace(last, content=f'{last.content}\n{self.instruction}')
    return *before, *messages[:-1], closed

  def render(self, messages: Sequence[types.Message]) -> tuple[int, ...]:
    """Token ids of a chat with system text and instruction."""
    return tuple(templates.render(self.tokenizer, self.instruct(messages), self.template))

  def worked(self, example: types.Example) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """(ids, what others said) of a worked dialogue, without the last stop id."""
    ids: list[int] = []
    others: list[bool] = []
    for message in example.dialogue:
      if message.role == 'assistant':
        new = [*self.tokenizer.encode(react.write(message, self.parser)), self.stop_id]
      else:
        new = templates.render_turn(self.tokenizer, [message], self.template)
      ids += new
      others += [message.role != 'assistant'] * len(new)
    return tuple(ids[:-1]), tuple(others[:-1])


@dataclasses.dataclass(frozen=True)
class Setup:
  """Everything about rollouts that stays fixed during a run. Buckets are in tokens."""

  model: ModelConfig
  questions: Questions
  grader: Any
  sampling: decode.Settings
  group_size: int
  prompt_tokens: int  # bucket of plain prompts
  reformulated_tokens: int  # bucket of prompts with candidates
  seed: int
  teacher: tuple[ModelConfig, Any] | None = None  # (config, params), frozen
  teacher_questions: Questions | None = None  # of a teacher with another tokenizer
  write_prompt_tokens: int = 0  # bucket of instructions to the teacher
  write_chunk: int = 64  # instructions per teacher call
  slots: int = 0  # rows in flight of the sampler, refilled as they end; 0 = all of a call
  chunk_groups: int = 0  # most groups per call of the sampler, bounding its cache; 0 = all
  allow_fractional: bool = False
  mesh: Any = None
  episodes: episodes.Episodes | None = None  # how the policy answers in several turns
  sparse: Sparse | None = None  # how many keys a token of the policy is drawn by; None = all

  @property
  def sampler(self) -> ModelConfig:
    """The policy's model as its tokens are drawn; scores are by all keys."""
    return dataclasses.replace(self.model, sparse=self.sparse)
