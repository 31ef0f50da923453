"""EleutherAI's lm-evaluation-harness drives our policy: its three requests, by its conventions.

`Requests` answers them on plain tuples of text; `adapter` puts the harness's own class around it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from zppo_jax.agents.records import GenRequest
from zppo_jax.core import rng, types
from zppo_jax.core.errors import UserError
from zppo_jax.data import templates
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.params import Params
from zppo_jax.sampling import continuations

MOST = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')  # first one counts
KNOWN = {*MOST, 'until', 'do_sample', 'temperature', 'top_p', 'num_beams'}
Ids = tuple[int, ...]
Pair = tuple[Ids, Ids]  # context, continuation
Score = tuple[float, bool]  # sum of log-probs, whether every token is the most likely one


def split(encode: Callable[[str], list[int]], prefix: int, context: str, continuation: str) -> Pair:
  """Ids of both sides: the whole is encoded, spaces that end the context go to the continuation.

  `prefix` stands for an empty context.
  """
  kept = context.rstrip()
  continuation = context[len(kept):] + continuation
  before, whole = encode(kept), encode(kept + continuation)
  if not before and whole[:1] == [prefix]:
    return (prefix,), tuple(whole[1:])
  # Pieces over the border may leave nothing, where the harness gives up.
  return tuple(before or [prefix]), tuple(whole[len(before):] or encode(continuation))


def fit(pair: Pair, max_length: int) -> Pair:
  """The pair, its context cut from the left: a model that reads max_length tokens predicts one
  more. Raises UserError on a continuation that is empty or longer than that."""
  context, continuation = pair
  if not 1 <= len(continuation) <= max_length:
    raise UserError(f'a continuation must have 1..{max_length} tokens (max_length), got '
                     f'{len(continuation)}: ids {continuation[:8]}')
  return context[-(max_length + 1 - len(continuation)):], continuation


def windows(tokens: Sequence[int], prefix: int, max_length: int) -> list[Pair]:
  """A text behind `prefix` in pieces of max_length tokens, each token predicted once.

  Every piece reads max_length tokens: one before its first token, more where the last is short.
  """
  whole = (prefix, *tokens)
  ends = [min(begin + max_length, len(tokens)) for begin in range(0, len(tokens), max_length)]
  return [(whole[max(0, end - max_length):begin + 1], whole[begin + 1:end + 1])
          for begin, end in zip([0, *ends], ends)]


def sampling(given: Mapping[str, Any], max_gen_toks: int) -> dict[str, Any]:
  """Fields of a GenRequest for the harness's generation kwargs.

  Greedy unless do_sample, or a temperature alone, asks for noise. Raises UserError naming kwargs
  that nothing here honours.
  """
  if unknown := sorted(set(given) - KNOWN):
    raise UserError(f'generation kwargs {unknown} are not supported, known are {sorted(KNOWN)}')
  given = {name: value for name, value in given.items() if value is not None}
  if given.get('num_beams', 1) != 1:
    raise UserError(f'generation kwargs: num_beams must be 1, got {given["num_beams"]}')
  until, sample = given.get('until') or (), given.get('do_sample')
  until = (until,) if isinstance(until, str) else tuple(until)
  # do_sample without a temperature is temperature 1 to transformers
  temperature = 0.0 if sample is False else float(given.get('temperature', 1.0 if sample else 0.0))
  most = next((given[name] for name in MOST if name in given), max_gen_toks)
  return dict(max_tokens=int(most), temperature=temperature,
              top_p=float(given.get('top_p', 1.0)) if temperature else 1.0,
              stop=tuple(s for s in until if s))


def score(config: ModelConfig, params: Params, pairs: Sequence[Pair], *,
          tokens_per_call: int = 4096) -> list[Score]:
  """Scores in the order of the pairs, which run together with others of their size."""
  track = functools.partial(tqdm.tqdm, desc='log-probs', disable=None)
  found = continuations.score(config, params, pairs, tokens_per_call=tokens_per_call, track=track)
  return [(float(logp.sum(dtype=np.float64)), bool(greedy.all())) for logp, greedy in found]


@dataclasses.dataclass(frozen=True)
class Requests:
  """The harness's requests as tuples of text, answered in order.

  `score` is the function above with its config and weights. `client` draws; its conversations must
  have room for max_length tokens. A `template` lets chats in: the text that it makes may then hold
  special tokens, which no other text does.
  """

  client: Any  # LMClient that takes tokens
  tokenizer: Any
  score: Callable[[Sequence[Pair]], list[Score]]
  max_length: int  # tokens that the model may read
  max_gen_toks: int = 256  # where a task does not say
  template: str | templates.Template | None = None
  add_bos: bool = False  # before a context that is not empty; an empty one always has it
  seed: int = 0
  requests_per_call: int = 64  # of the client

  @property
  def prefix(self) -> int:
    """What an empty context becomes: bos, or eos where there is none."""
    bos = self.tokenizer.bos_id
    return bos if bos >= 0 else self.tokenizer.eos_id

  def encode(self, text: str) -> list[int]:
    return self.tokenizer.encode(text, special=self.template is not None)

  def _opened(self, ids: Sequence[int]) -> Ids:
    bare = not self.add_bos or list(ids[:1]) == [self.prefix]
    return tuple(ids) if bare and ids else (self.prefix, *ids)

  def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[Score]:
    """Scores of (context, continuation). Raises UserError as `fit` does."""
    pairs = [split(self.encode, self.prefix, *r) for r in requests]
    pairs = [(self._opened(context), continuation) for context, continuation in pairs]
    kept = [fit(pair, self.max_length) for pair in pairs]
    self._report(sum(len(a[0]) > len(b[0]) for a, b in zip(pairs, kept)), len(pairs))
    return self.score(kept)

  def loglikelihood_rolling(self, requests: Sequence[tuple[str]]) -> list[float]:
    """Log-prob of each text behind the prefix, in windows; of an empty one 0."""
    pieces = [windows(self.encode(text), self.prefix, self.max_length) for text, in requests]
    scores = iter(self.score([pair for piece in pieces for pair in piece]))
    return [float(sum(next(scores)[0] for _ in piece)) for piece in pieces]

  def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Texts up to the first stop string. Raises UserError on kwargs that are not supported, on no
    room for a context, and on a request that the client refuses.

    Noise belongs to the seed, the context and how often it was asked before.
    """
    asked, times, cut = [], collections.Counter(), 0
    for context, kwargs in requests:
      fields = sampling(kwargs, self.max_gen_toks)
      room = self.max_length - fields['max_tokens']
      if room < 1:
        raise UserError(f'max_gen_toks must be below max_length, {self.max_length}, to leave room '
                         f'for a context, got {fields["max_tokens"]}')
      ids = self._opened(self.encode(context))
      cut += len(ids) > room
      name = rng.name_hash(f'{self.seed}/{times[context]}/{context}')
      times[context] += 1
      asked.append(GenRequest(token_ids=ids[-room:], seed=name, **fields))
    self._report(cut, len(asked))
    found: dict[int, str] = {}
    for names in tqdm.tqdm(list(self._parts(asked)), desc='answers', disable=None):
      for i, answer in zip(names, self.client.generate([asked[i] for i in names])):
        if answer.finish == 'error':
          raise UserError(f'request {i}: {answer.error}')
        found[i] = answer.text
    return [found[i] for i in range(len(asked))]

  def _parts(self, asked: Sequence[GenRequest]) -> Iterator[list[int]]:
    """Which requests go into each call: drawn alike, the longest first."""
    alike = collections.defaultdict(list)
    for i, r in enumerate(asked):
      alike[r.temperature, r.top_p, r.stop].append(i)
    for names in alike.values():
      names.sort(key=lambda i: -len(asked[i].token_ids))
      for begin in range(0, len(names), self.requests_per_call):
        yield names[begin:begin + self.requests_per_call]

  def _report(self, cut: int, count: int) -> None:
    if cut:
      logging.warning('%d of %d contexts were cut from the left: max_length is %d', cut, count,
                      self.max_length)

  def apply_chat_template(self, history: Sequence[Mapping[str, str]],
                          add_generation_prompt: bool = True) -> str:
    """Text of a chat; without a generation prompt it ends inside the last message, to be gone on
    with. Raises UserError without a template, and on one that leaves out how that message begins.
    """
    if self.template is None:
      raise UserError('chats need a template: the policy was given none')
    special = {i: token for token, i in self.tokenizer.special.items()}
    text = templates.get_template(self.template).format(
      [types.Message(m['role'], m['content']) for m in history], add_generation_prompt,
      special.get(self.tokenizer.bos_id, ''), special[self.tokenizer.eos_id])
    if add_generation_prompt:
      return text
    last = history[-1]['content']
    last = last if last in text else last.strip()  # as many templates write it
    if last not in text:
      raise UserError(f'the template leaves out what an answer begins with: {last!r}')
    return text[:text.rindex(last) + len(last)]


def adapter(client: Any, tokenizer: Any, *, score: Callable[[Sequence[Pair]], list[Score]],
            max_length: int, **options: Any):
  """An `lm_eval.api.model.LM`; arguments are the fields of `Requests`.

  Raises UserError where lm_eval is not installed, ValueError on a template that the tokenizer
  cannot write.
  """
  try:
    from lm_eval.api import model
  except ImportError as error:
    raise UserError("the harness is not installed: pip install 'zppo_jax[eval]'") from error
  own = Requests(client, tokenizer, score, max_length, **options)
  if own.template is not None:
    templates.render(tokenizer, (types.Message('user', '.'),), own.template)

  class ZppoJax(model.LM):
    """What the harness calls: requests carry their arguments in `args`."""

    def loglikelihood(self, requests):
      return own.loglikelihood([r.args for r in requests])

    def loglikelihood_rolling(self, requests):
      return own.loglikelihood_rolling([r.args for r in requests])

    def generate_until(self, requests):
      return own.generate_until([r.args for r in requests])

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
      return own.apply_chat_template(chat_history, add_generation_prompt)

    def chat_template(self, chat_template=False):
      return templates.get_template(own.template).name if own.template else ''

    @property
    def tokenizer_name(self):  # names its cache of rendered requests
      return f'{tokenizer.fingerprint}-{self.chat_template()}'

  return ZppoJax()
