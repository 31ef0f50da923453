"""A language model behind an OpenAI-compatible HTTP server. Needs httpx, the extra 'http'."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import random
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from zppo_jax.agents import chat_json
from zppo_jax.agents.llm import Unsupported
from zppo_jax.agents.records import Completion, GenRequest, ScoreRequest, TokenScores
from zppo_jax.core import errors

_CONNECT_S, _FIRST_WAIT_S, _LONGEST_WAIT_S = 10.0, 0.5, 30.0  # a lost SYN must leave time
_EMBED_ROWS = 64  # texts per request
_MOST = 1e9  # of any number that is given: more seconds are too many for a socket
_OWN_FIELDS = {'model', 'messages', 'tools', 'temperature', 'top_p', 'top_k', 'min_p', 'max_tokens',
               'stop', 'seed',
               'n', 'logprobs', 'stream', 'input'}


@dataclasses.dataclass(frozen=True)
class _Fault:
  text: str
  again: Literal['never', 'once', 'always']
  wait_s: float = 0.0  # as the server asked


def _load(path: str, n: int) -> list[Completion] | None:
  """The answers of a cache file; None if there is none or it is corrupt."""
  try:
    with open(path, encoding='utf-8') as file:
      completions = [chat_json.read_completion(answer) for answer in json.load(file)]
  except (OSError, *chat_json.MISREAD):
    return None
  return completions if len(completions) == n else None


def _store(path: str, answers: Sequence[chat_json.Answer], key: str) -> None:
  text = json.dumps(answers)
  if key and key in text:  # an echo: the key is never stored
    return
  try:
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
      temporary = os.path.join(folder, 'answers')
      with open(temporary, 'w', encoding='utf-8') as file:
        file.write(text)
      os.replace(temporary, path)
  except OSError as error:  # the answers are paid for: a full disk must not lose them
    logging.getLogger(__name__).warning('cache_dir: not written: %s', error)


def _check(base_url: str, extra: Mapping[str, Any], **bounds: tuple[float, float]) -> None:
  try:
    parts = urllib.parse.urlsplit(base_url)
    bare = not (parts.query or parts.fragment or '@' in parts.netloc)  # there, secrets would show
    named = (parts.hostname or '').encode('idna') and parts.port != 0 and base_url.isprintable()
  except ValueError:
    named = False
  if not (named and bare and parts.scheme in ('http', 'https')):
    raise errors.UserError('base_url: wants http(s)://host[:port][/path] and nothing else')
  if taken := sorted(_OWN_FIELDS & set(extra)):
    raise errors.UserError(f'extra: {taken} are fields that the client sets itself')
  for name, (value, least) in bounds.items():
    if not least <= value <= _MOST:
      raise errors.UserError(f'{name}: must lie in {least}..{_MOST:.0f}, is {value}')


class HTTPClient:
  """An `LMClient` over `POST {base_url}/chat/completions`; no token ids, so never trainable.

  `deadline_s` bounds one HTTP request with all its retries; a reply that drips before it stalls may
  take up to twice that, and only a head that drips is bounded by nothing but its server. Of n
  answers in one reply the first carries the usage of all. A tool call whose arguments cannot be
  read is the model's own fault: finish stays 'tool' and `error` names it. A message of a tool that
  answers no call is sent as the user's: no server takes it else. `tokens_field` is the server's
  name of `max_tokens`, `extra` goes into every chat request as it is. `sleep` and `uniform` (in [0,
  1)) are for tests. UserError on bad arguments, ImportError without httpx.
  """

  def __init__(self, base_url: str, model: str, *, api_key_env: str = '', concurrency: int = 8,
               deadline_s: float = 120.0, retries: int = 5, cache_dir: str = '',
               logprobs: bool = False, tokens_field: str = 'max_tokens',
               extra: Mapping[str, Any] | None = None,
               sleep: Callable[[float], None] = time.sleep,
               uniform: Callable[[], float] = random.random):
    _check(base_url, extra or {}, concurrency=(concurrency, 1), retries=(retries, 0),
           deadline_s=(deadline_s, 1e-3))
    try:
      import httpx
    except ImportError as error:
      raise ImportError("httpx is missing: pip install 'zppo_jax[http]'") from error
    if cache_dir:
      os.makedirs(cache_dir, exist_ok=True)
    self.capabilities = frozenset({'tools', 'json'} | ({'logprobs'} if logprobs else set()))
    self._base_url, self._model, self._api_key_env = base_url.rstrip('/'), model, api_key_env
    self._deadline_s, self._retries, self._cache_dir = deadline_s, retries, cache_dir
    self._logprobs, self._tokens_field, self._extra = logprobs, tokens_field, dict(extra or {})
    self._sleep, self._uniform = sleep, uniform
    self._http = httpx.Client(limits=httpx.Limits(max_connections=concurrency))
    self._pool = concurrent.futures.ThreadPoolExecutor(concurrency)  # of all calls together

  def __enter__(self) -> HTTPClient:
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def close(self) -> None:
    """Waits for what is under way and closes the connections."""
    self._pool.shutdown(cancel_futures=True)
    self._http.close()

  def generate(self, requests: Sequence[GenRequest]) -> list[Completion]:
    """n answers per request, in order. ValueError on a request that no server can be asked,
    UserError without the key: both before anything is sent."""
    bodies = [self._body(r) for r in requests]
    key = self._key()
    answers = self._pool.map(lambda r, body: self._answer(r, body, key), requests, bodies)
    return [c if self._logprobs else dataclasses.replace(c, logprobs=None)
            for row in answers for c in row]

  def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
    """Always raises Unsupported."""
    raise Unsupported('a chat server gives no log-probs of given tokens')

  def embed(self, texts: Sequence[str]) -> np.ndarray:
    """Rows of unit norm, f32[n, d], from `POST {base_url}/embeddings`; RuntimeError if one fails
    or a row has no direction, UserError without the key."""
    key = self._key()
    parts = [list(texts[i:i + _EMBED_ROWS]) for i in range(0, len(texts), _EMBED_ROWS)]
    ask = lambda part: self._post('/embeddings', {'model': self._model, 'input': part},
                                  lambda payload: chat_json.read_rows(payload, len(part)), key)
    rows = list(self._pool.map(ask, parts)) or [np.zeros((0, 0), np.float32)]
    if faults := [r.text for r in rows if isinstance(r, _Fault)]:
      raise RuntimeError(f'embeddings: {faults[0]}')
    return np.concatenate(rows)

  def _key(self) -> str:
    if not self._api_key_env:
      return ''
    key = os.environ.get(self._api_key_env, '').strip()  # read anew: no object holds it
    if not key:
      raise errors.UserError(f'api_key_env: the variable {self._api_key_env} is not set')
    if not (key.isascii() and key.isprintable()):  # httpx would quote it in its error
      raise errors.UserError(f'api_key_env: {self._api_key_env} holds what no header can')
    return key

  def _body(self, request: GenRequest) -> dict[str, Any]:
    if request.token_ids is not None:
      raise ValueError('token_ids: a server would tokenise anew; send messages instead')
    if not request.messages or request.n < 1:
      raise ValueError(f'wants messages and n >= 1, has {len(request.messages)}, n {request.n}')
    body = self._extra | {
      'model': self._model, 'messages': [chat_json.write_message(m) for m in request.messages],
      self._tokens_field: request.max_tokens, 'temperature': request.temperature,
      'top_p': request.top_p}
    body |= {name: value for name, value in (('top_k', request.top_k), ('min_p', request.min_p))
             if value}  # not every server knows them
    body |= chat_json.given({
      'tools': [{'type': 'function', 'function': dataclasses.asdict(t)} for t in request.tools],
      'stop': list(request.stop), 'logprobs': self._logprobs})
    return body if request.seed is None else body | {'seed': request.seed}

  def _answer(self, request: GenRequest, body: dict[str, Any], key: str) -> list[Completion]:
    path = ''
    if self._cache_dir and (request.temperature == 0 or request.seed is not None):
      full = json.dumps([self._base_url, self._model, request.n, body], sort_keys=True)
      path = os.path.join(self._cache_dir, f'{hashlib.sha256(full.encode()).hexdigest()}.json')
      if (cached := _load(path, request.n)) is not None:
        return cached
    answers: list[chat_json.Answer] = []
    while (left := request.n - len(answers)) > 0:
      ask = body | ({'n': left} if left > 1 else {})  # some servers do not know the field
      if answers and request.seed is not None:  # the same seed would give the first ones again
        noise = hashlib.sha256(f'{request.seed}/{len(answers)}'.encode()).digest()
        ask['seed'] = int.from_bytes(noise[:4], 'big') >> 1
      found = self._post('/chat/completions', ask, chat_json.read_answers, key)
      if isinstance(found, _Fault):
        fault = Completion('', 'error', error=found.text)
        return [*map(chat_json.read_completion, answers)] + [fault] * left
      answers += found[:left]
    completions = [*map(chat_json.read_completion, answers)]
    if path and all(c.finish != 'error' for c in completions):
      _store(path, answers, key)
    return completions

  def _post(self, path: str, body: dict[str, Any], read: Callable[[Any], Any], key: str) -> Any:
    """What `read` makes of the reply, or the _Fault of the last attempt."""
    until = time.monotonic() + self._deadline_s
    unreadable = 0
    for attempt in range(self._retries + 1):
      found = self._attempt(path, body, key, until)
      if isinstance(found, str):
        try:
          return read(json.loads(found))
        except chat_json.MISREAD as error:
          why = _excerpt(repr(error), key)
          found = _Fault(f'unreadable answer, {why}: {_excerpt(found, key)}', 'once')
      # Once more, for a proxy may have cut it; what is no such server stays so, at a price each.
      unreadable += found.again == 'once'
      if found.again == 'never' or unreadable > 1 or attempt == self._retries:
        return found
      longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(attempt, 9))
      wait = found.wait_s + self._uniform() * longest
      if time.monotonic() + wait >= until:
        return _Fault(f'{found.text} (waiting {wait:.3g} s would pass '
                      f'deadline_s={self._deadline_s:g})', 'never')
      self._sleep(wait)

  def _attempt(self, path: str, body: dict[str, Any], key: str, until: float) -> str | _Fault:
    import httpx
    left, parts = max(until - time.monotonic(), 1e-3), []
    headers = {'Content-Type': 'application/json'}
    headers |= {'Authorization': f'Bearer {key}'} if key else {}
    try:
      with self._http.stream(
          'POST', self._base_url + path, content=json.dumps(body).encode(), headers=headers,
          timeout=httpx.Timeout(left, connect=min(left, _CONNECT_S))) as reply:
        reply.request.extensions['timeout']['read'] = max(until - time.monotonic(), 1e-3)
        for part in reply.iter_bytes():  # httpx bounds each read, not their sum
          parts.append(part)
          if time.monotonic() >= until:
            return _Fault(f'deadline_s={self._deadline_s:g} passed within the reply', 'never')
    except httpx.HTTPError as error:
      again = 'always' if isinstance(error, httpx.TransportError) else 'once'
      return _Fault(_excerpt(f'{type(error).__name__}: {error}', key), again)
    text, status = b''.join(parts).decode('utf-8', 'replace'), reply.status_code
    if status == 200:
      return text
    again = 'always' if status in (408, 429) or status >= 500 else 'never'
    after = reply.headers.get('Retry-After', '')
    return _Fault(f'status {status}: {_excerpt(text, key)}', again,
                  float(after) if after.isdecimal() else 0.0)  # a date is not read: clocks differ


def _excerpt(text: str, key: str) -> str:
  return (text.replace(key, '[key]') if key else text)[:200]  # servers like to quote a wrong key
