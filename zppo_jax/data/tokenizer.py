"""Tokenizers: one protocol, a character tokenizer, and builders for the other back ends.

`encode(text)` never yields a special id: a special token written inside content is spelled out.
Only `encode(text, special=True)`, meant for template text, maps special tokens to their ids.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

PRINTABLE = '\n' + ''.join(map(chr, range(32, 127)))
PAD, BOS, EOS, SEP = '<|pad|>', '<|bos|>', '<|eos|>', '<|sep|>'
SPECIALS = (PAD, BOS, EOS, SEP)


class Tokenizer(Protocol):
  """What every back end offers; ids are Python ints in [0, vocab_size)."""

  special: dict[str, int]
  pad_id: int
  bos_id: int
  eos_id: int
  vocab_size: int
  fingerprint: str

  def encode(self, text: str, special: bool = False) -> list[int]: ...

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str: ...

  def token_bytes(self, token_id: int) -> bytes: ...

  def to_json(self) -> dict[str, Any]: ...


def compile_special(special: Iterable[str]) -> re.Pattern | None:
  """Pattern that finds special tokens, the longest first; None when there are none."""
  ordered = sorted(special, key=lambda token: (-len(token), token))
  return re.compile('(' + '|'.join(map(re.escape, ordered)) + ')') if ordered else None


def split_special(text: str, pattern: re.Pattern | None) -> list[tuple[str, bool]]:
  """Parts of the text as (part, is special), empty parts left out."""
  parts = pattern.split(text) if pattern else [text]
  return [(part, bool(i % 2)) for i, part in enumerate(parts) if part]


def break_special(text: str, pattern: re.Pattern | None) -> list[str]:
  """Pieces of the text, cut inside every special token, so that none survives whole."""
  cuts, position = [0], 0
  while pattern and (match := pattern.search(text, position)):
    position = match.start() + 1
    cuts.append(position)
  return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)]) if b > a]


def fingerprint(state: dict[str, Any]) -> str:
  """16 hex digits that change whenever any id, piece or option changes."""
  text = json.dumps(state, sort_keys=True, ensure_ascii=True, separators=(',', ':'))
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def padded_vocab_size(tokenizer: Tokenizer, multiple: int = 128) -> int:
  """Vocabulary rounded up for sharding; mask the logits of the added ids to -inf."""
  return -(-tokenizer.vocab_size // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
  r"""One id per character, plus longer `pieces` (`'\\boxed{'`) that are taken greedily.

  Ids: `specials`, then 256 bytes if `byte_fallback`, then `characters`, then `pieces`. The default
  is total on printable ASCII and newline. Any other character raises ValueError with its position,
  or becomes its UTF-8 bytes under `byte_fallback`. `specials` must hold pad, bos and eos.
  """

  pieces: tuple[str, ...] = ()
  specials: tuple[str, ...] = SPECIALS
  characters: str = PRINTABLE
  byte_fallback: bool = False

  def __post_init__(self):
    object.__setattr__(self, 'pieces', tuple(self.pieces))
    object.__setattr__(self, 'specials', tuple(self.specials))
    names = [*self.specials, *self.characters, *self.pieces]
    repeated = sorted({name for name in names if names.count(name) > 1})
    missing = [name for name in (PAD, BOS, EOS) if name not in self.specials]
    short = [name for name in (*self.specials, *self.pieces) if len(name) < 2]
    errors = [
      f'{reason}: {values!r}'
      for reason, values in (
        ('named twice', repeated),
        ('missing from specials', missing),
        ('specials and pieces need two or more characters', short),
      )
      if values
    ]
    if errors:
      raise ValueError('CharTokenizer: ' + '; '.join(errors))

  @classmethod
  def from_text(cls, texts: Iterable[str], specials: Sequence[str] = SPECIALS, **kwargs):
    """A tokenizer that also knows every character of `texts`."""
    seen = set().union(*map(set, texts)) - set(PRINTABLE)
    return cls(specials=tuple(specials), characters=PRINTABLE + ''.join(sorted(seen)), **kwargs)

  @functools.cached_property
  def special(self) -> dict[str, int]:
    return {token: i for i, token in enumerate(self.specials)}

  @functools.cached_property
  def _vocabulary(self) -> tuple[bytes, ...]:
    fallback = [bytes([i]) for i in range(256)] if self.byte_fallback else []
    text = [*self.characters, *self.pieces]
    return tuple([s.encode() for s in self.specials] + fallback + [t.encode() for t in text])

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    start = len(self.specials) + 256 * self.byte_fallback
    return {text: start + i for i, text in enumerate([*self.characters, *self.pieces])}

  @functools.cached_property
  def _pattern(self) -> re.Pattern:
    ordered = sorted(self.pieces, key=len, reverse=True)
    return re.compile('|'.join([*map(re.escape, ordered), '.']), re.DOTALL)

  @functools.cached_property
  def _special_pattern(self) -> re.Pattern:
    return compile_special(self.specials)

  @property
  def vocab_size(self) -> int:
    return len(self._vocabulary)

  @property
  def pad_id(self) -> int:
    return self.special[PAD]

  @property
  def bos_id(self) -> int:
    return self.special[BOS]

  @property
  def eos_id(self) -> int:
    return self.special[EOS]

  @functools.cached_property
  def fingerprint(self) -> str:
    return fingerprint(self.to_json())

  def _fallback(self, text: str, match: re.Match) -> list[int]:
    if not self.byte_fallback:
      raise ValueError(
        f'character {match.group()!r} at position {match.start()} of {text[:40]!r} is not in the '
        'vocabulary: build the tokenizer with from_text or byte_fallback=True'
      )
    return [len(self.specials) + byte for byte in match.group().encode()]

  def encode(self, text: str, special: bool = False) -> list[int]:
    """Ids of the text; special tokens keep their ids only if `special`. ValueError: see class."""
    if special:
      parts = split_special(text, self._special_pattern)
      coded = ([self.special[part]] if known else self.encode(part) for part, known in parts)
      return [token for part in coded for token in part]
    ids: list[int] = []
    for match in self._pattern.finditer(text):
      known = self._ids.get(match.group())
      ids.extend(self._fallback(text, match) if known is None else [known])
    return ids

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Text of the ids; invalid byte runs become U+FFFD."""
    skip = len(self.specials) if skip_special else 0
    pieces = b''.join(self.token_bytes(i) for i in map(int, ids) if i >= skip or i < 0)
    return pieces.decode('utf-8', errors='replace')

  def token_bytes(self, token_id: int) -> bytes:
    """The bytes that one id stands for; IndexError names a bad id."""
    if not 0 <= token_id < self.vocab_size:
      raise IndexError(f'token id {token_id} is outside [0, {self.vocab_size})')
    return self._vocabulary[token_id]

  def to_json(self) -> dict[str, Any]:
    return {'kind': 'char', **dataclasses.asdict(self)}


def save(tokenizer: Tokenizer, path: str | pathlib.Path) -> None:
  """Writes the whole tokenizer as one JSON file."""
  pathlib.Path(path).write_text(json.dumps(tokenizer.to_json(), ensure_ascii=True))


def load(path: str | pathlib.Path) -> Tokenizer:
  """Reads what `save` wrote, equal in every id."""
  return from_json(json.loads(pathlib.Path(path).read_text(encoding='utf-8')))


def from_json(state: dict[str, Any]) -> Tokenizer:
  """The tokenizer that `to_json` described; ValueError on an unknown kind."""
  state = dict(state)
  kind = state.pop('kind', None)
  if kind == 'char':
    return CharTokenizer(**state)
  if kind == 'sentencepiece':
    from zppo_jax.data import subwords

    return subwords.SentencePieceTokenizer(base64.b64decode(state['model']))
  if kind == 'hf':
    from zppo_jax.data import subwords

    return subwords.HFTokenizer(**state)
  raise ValueError(f"tokenizer kind {kind!r} is not one of 'char', 'sentencepiece', 'hf'")


def build_tokenizer(spec: dict[str, Any], texts: Iterable[str] = ()) -> Tokenizer:
  """A tokenizer from a plain dict: {'kind': 'char', ...} or {'kind': .., 'path': ..}.

  'char' takes pieces, specials, byte_fallback, and learns the characters of `texts`;
  'sentencepiece' takes `path` (a .model) or trains on `texts` (vocab_size); 'hf' takes `path`
  (tokenizer.json or its folder); 'saved' takes `path` (what `save` wrote). ValueError lists every
  unknown key.
  """
  allowed = {
    'char': {'pieces', 'specials', 'byte_fallback'},
    'sentencepiece': {'path', 'vocab_size'},
    'hf': {'path'},
    'saved': {'path'},
  }
  options = {key: value for key, value in dict(spec).items() if key != 'kind'}
  kind = spec.get('kind', 'char')
  if kind not in allowed:
    raise ValueError(f'tokenizer kind {kind!r} is not one of {sorted(allowed)}')
  if unknown := sorted(set(options) - allowed[kind]):
    raise ValueError(f'tokenizer {kind!r}: unknown {unknown}, known {sorted(allowed[kind])}')
  if kind == 'char':
    return CharTokenizer.from_text(texts, **options)
  if kind == 'saved':
    return load(options['path'])
  from zppo_jax.data import subwords

  if kind == 'hf':
    return subwords.HFTokenizer.from_file(options['path'])
  if 'path' in options:
    return subwords.SentencePieceTokenizer(pathlib.Path(options['path']).read_bytes())
  return subwords.SentencePieceTokenizer(subwords.train_sentencepiece(texts, **options))
