"""The in-process policy as a client: exact tokens, log-probs and versions."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from typing import Any

import jax

from zppo_jax.agents.records import Completion, GenRequest, ScoreRequest, TokenScores, Usage
from zppo_jax.core import types
from zppo_jax.data import templates
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.params import Params
from zppo_jax.sampling import continuations, conversations, decode, stops

NOT_FINITE = 'the logits of the policy are not finite'


class PolicyClient:
  """Answers from weights in this process, each conversation going on from its cache.

  The only client whose answers may be trained on. Requests of one call that are drawn alike run
  together. `key` and a request's seed name the noise; a request without a seed gets a fresh one.
  """

  capabilities: frozenset[str] = frozenset({'tokens', 'logprobs', 'score', 'train'})

  def __init__(self, config: ModelConfig, params: Params, tokenizer: Any,
               template: str | templates.Template, *, shape: conversations.Shape, key: jax.Array,
               max_new_tokens: int = 256, version: int = 0):
    self._config, self._params, self._version = config, params, version
    self._tokenizer, self._template, self._key = tokenizer, template, key
    self.stop_id = templates.stop_id(tokenizer, template)
    self._most = max_new_tokens
    self._chat = conversations.Conversations(config, shape)
    self._fresh = itertools.count(2**31)
    self._updates = 0  # what the slots forget by: a version may come twice

  def update(self, params: Params, version: int) -> None:
    """New weights from the next call on; what the slots hold is forgotten."""
    self._params, self._version = params, version
    self._updates += 1

  def open(self, messages: Sequence[types.Message]) -> list[int]:
    """Token ids of a chat, up to where the answer begins."""
    return templates.render(self._tokenizer, messages, self._template)

  def turn(self, messages: Sequence[types.Message]) -> list[int]:
    """Token ids that follow an answer which ended by itself."""
    return templates.render_turn(self._tokenizer, messages, self._template)

  def generate(self, requests: Sequence[GenRequest]) -> list[Completion]:
    """Completions in order, `n` per request. One that does not fit has finish 'error' and a reason;
    the others are answered."""
    found: dict[tuple[int, int], Completion] = {}
    batches = collections.defaultdict(list)
    for i, r in enumerate(requests):
      try:
        settings = self._settings(r)
        asked = self._check(r, settings)
      except (TypeError, ValueError) as error:
        found |= {(i, s): Completion('', 'error', error=str(error)) for s in range(max(1, r.n))}
        continue
      batches[settings, r.stop] += [((i, s), a) for s, a in enumerate(asked)]
    for (settings, stop), asked in batches.items():
      found |= self._draw(settings, stop, asked)
    return [found[k] for k in sorted(found)]

  def _check(self, r: GenRequest, settings: decode.Settings) -> list[conversations.Request]:
    """What to draw; raises ValueError naming what is wrong with the request."""
    decode.check_settings(settings)
    if r.n < 1:
      raise ValueError(f'n must be at least 1, got {r.n}')
    if not all(r.stop):
      raise ValueError(f'stop strings must not be empty, got {r.stop}')
    if r.tools:
      raise ValueError('tools: this client knows no format for them, describe them in a message '
                       '(parsing.tools_text)')
    ids = tuple(r.token_ids if r.token_ids is not None else self.open(r.messages))
    name = (next(self._fresh) if r.seed is None else r.seed) % 2**32
    asked = [conversations.Request(ids, r.max_tokens, name, s) for s in range(r.n)]
    self._chat.check(asked[0], settings)
    return asked

  def _settings(self, r: GenRequest) -> decode.Settings:
    return decode.Settings(
      max_new_tokens=self._most, eos_ids=(self.stop_id,), temperature=float(r.temperature),
      top_k=int(r.top_k), top_p=float(r.top_p), min_p=float(r.min_p),
      group_size=max(1, r.n) if r.temperature < decode.GREEDY_BELOW else 1)

  def _draw(self, settings, stop, asked) -> dict[tuple[int, int], Completion]:
    text = self._tokenizer.decode
    answers = self._chat.generate(
      self._params, [r for _, r in asked], key=self._key, settings=settings, version=self._updates,
      stop=stops.stop_strings(stop, text) if stop else None)
    found = {}
    for (name, r), a in zip(asked, answers):
      if a.fault:
        found[name] = Completion('', 'error', error=NOT_FINITE)
        continue
      said = text(a.tokens)
      found[name] = Completion(
        stops.cut(said, stop), 'stop' if a.stopped else 'length', a.tokens, a.logp, r.tokens,
        self._version, Usage(len(r.tokens), len(a.tokens)))
    return found

  def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
    """Log-probs at temperature 1. Raises ValueError on an empty prompt."""
    pairs = [(r.prompt_token_ids, r.token_ids) for r in requests]
    return [TokenScores(tuple(logp.tolist()))
            for logp, _ in continuations.score(self._config, self._params, pairs)]
