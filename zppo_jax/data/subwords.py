"""Subword tokenizers: SentencePiece, trained offline, and Hugging Face `tokenizer.json`."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from zppo_jax.data import tokenizer as tokenizer_lib

SYMBOLS = (
  '<|im_start|>', '<|im_end|>', '<think>', '</think>', '<tool_call>', '</tool_call>',
  '<image>', '<video>', '\n',
)  # fmt: skip


def train_sentencepiece(
  texts: Iterable[str], vocab_size: int = 512, symbols: tuple[str, ...] = SYMBOLS
) -> bytes:
  """A byte-fallback BPE model that decodes to exactly what it encoded; same text, same bytes.

  `vocab_size` must leave room for 256 bytes, 4 controls and the symbols, else ValueError.
  """
  import sentencepiece

  smallest = 256 + 4 + len(symbols)
  if vocab_size < smallest:
    raise ValueError(f'vocab_size {vocab_size} must be >= {smallest} (bytes, controls, symbols)')
  lines = [line for text in texts for line in text.splitlines() if line]
  if not lines:
    raise ValueError('no text to train a tokenizer on')
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    model_type='bpe',
    vocab_size=vocab_size,
    hard_vocab_limit=False,
    byte_fallback=True,
    character_coverage=1.0,
    split_digits=True,
    # The defaults (NFKC, dummy prefix, squeezed spaces) would break decode(encode(x)) == x.
    normalization_rule_name='identity',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    user_defined_symbols=list(symbols),
    num_threads=1,
    minloglevel=2,
  )
  return model.getvalue()


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
  """A trained SentencePiece model (`model` = the bytes of its proto)."""

  model: bytes

  def __post_init__(self):
    missing = [n for n, i in (('pad', self.pad_id), ('eos', self.eos_id)) if i < 0]
    if missing:
      raise ValueError(f'the SentencePiece model has no {" and no ".join(missing)} id')

  @functools.cached_property
  def _processor(self):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=self.model)

  @functools.cached_property
  def special(self) -> dict[str, int]:
    """Controls, and user symbols in angle brackets; '\\n' and byte pieces are plain text."""
    spm = self._processor
    pieces = {spm.id_to_piece(i): i for i in range(spm.vocab_size()) if not spm.is_byte(i)}
    bracketed = {t: i for t, i in pieces.items() if t[:1] == '<' and t[-1:] == '>' and len(t) > 2}
    return {
      t: i
      for t, i in bracketed.items()
      if not spm.is_unknown(i) and (spm.is_control(i) or spm.get_score(i) == 0.0)
    }

  @functools.cached_property
  def _special_pattern(self):
    return tokenizer_lib.compile_special(self.special)

  @property
  def vocab_size(self) -> int:
    return self._processor.vocab_size()

  @property
  def pad_id(self) -> int:
    return self._processor.pad_id()

  @property
  def bos_id(self) -> int:
    return self._processor.bos_id()

  @property
  def eos_id(self) -> int:
    return self._processor.eos_id()

  @functools.cached_property
  def fingerprint(self) -> str:
    return tokenizer_lib.fingerprint(self.to_json())

  def encode(self, text: str, special: bool = False) -> list[int]:
    """Ids of the text; special tokens keep their ids only if `special`."""
    if special:
      parts = tokenizer_lib.split_special(text, self._special_pattern)
      coded = ([self.special[part]] if known else self.encode(part) for part, known in parts)
      return [token for part in coded for token in part]
    # User symbols always match inside SentencePiece, so content is cut in the middle of each.
    pieces = tokenizer_lib.break_special(text, self._special_pattern)
    return [token for piece in pieces for token in self._processor.encode(piece)]

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Text of the ids; invalid byte runs become U+FFFD."""
    special = set(self.special.values()) if skip_special else ()
    joined = b''.join(self.token_bytes(i) for i in map(int, ids) if i not in special)
    return joined.decode('utf-8', errors='replace')

  def token_bytes(self, token_id: int) -> bytes:
    """The bytes that one id stands for; IndexError names a bad id."""
    if not 0 <= token_id < self.vocab_size:
      raise IndexError(f'token id {token_id} is outside [0, {self.vocab_size})')
    piece = self._processor.id_to_piece(token_id)
    if self._processor.is_byte(token_id):
      return bytes([int(piece[3:-1], 16)])
    return piece.replace('\u2581', ' ').encode()

  def to_json(self) -> dict[str, Any]:
    return {'kind': 'sentencepiece', 'model': base64.b64encode(self.model).decode()}


def _bytes_of_characters() -> dict[str, int]:
  """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [b for b in range(256) if b not in shown]
  return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _token_text(value: Any) -> str | None:
  """A token of tokenizer_config.json: a string or {'content': string}."""
  return value.get('content') if isinstance(value, dict) else value


@dataclasses.dataclass(frozen=True)
class HFTokenizer:
  """A `tokenizer.json` through the `tokenizers` wheel; every added token counts as special.

  `definition` is the text of tokenizer.json; `names` maps 'pad', 'bos', 'eos' to added tokens.
  """

  definition: str
  names: dict[str, str]

  def __post_init__(self):
    errors = [f'{role} {t!r}' for role, t in self.names.items() if t not in self.special]
    errors += [f'no {role} token' for role in ('pad', 'eos') if role not in self.names]
    if errors:
      raise ValueError(f'tokenizer.json lacks {errors}; added tokens are {sorted(self.special)}')

  @classmethod
  def from_file(cls, path: str | pathlib.Path) -> HFTokenizer:
    """Reads tokenizer.json (or its folder) and the tokenizer_config.json beside it.

    Without a configured pad token the eos token pads: masks are explicit, no id means padding.
    """
    path = pathlib.Path(path)
    path = path / 'tokenizer.json' if path.is_dir() else path
    if not path.exists():
      raise FileNotFoundError(f'{path}: expected tokenizer.json, with tokenizer_config.json beside')
    beside = path.parent / 'tokenizer_config.json'
    config = json.loads(beside.read_text(encoding='utf-8')) if beside.exists() else {}
    names = {r: _token_text(config.get(f'{r}_token')) for r in ('pad', 'bos', 'eos')}
    definition = path.read_text(encoding='utf-8')
    added = [t['content'] for t in json.loads(definition).get('added_tokens', ())]
    for role, usual in _USUAL_NAMES.items():
      names[role] = names[role] or next((t for t in usual if t in added), None)
    names['pad'] = names['pad'] or names['eos']
    return cls(definition, {role: token for role, token in names.items() if token})

  @functools.cached_property
  def _state(self) -> dict[str, Any]:
    return json.loads(self.definition)

  @functools.cached_property
  def special(self) -> dict[str, int]:
    return {token['content']: token['id'] for token in self._state.get('added_tokens', ())}

  @functools.cached_property
  def _full(self):
    import tokenizers

    return tokenizers.Tokenizer.from_str(self.definition)

  @functools.cached_property
  def _ordinary(self):
    """The same model without its added tokens: content can no longer match them."""
    import tokenizers

    bare = self._state | {'added_tokens': [], 'post_processor': None, 'truncation': None}
    return tokenizers.Tokenizer.from_str(json.dumps(bare | {'padding': None}))

  @functools.cached_property
  def _special_pattern(self):
    return tokenizer_lib.compile_special(self.special)

  @functools.cached_property
  def vocab_size(self) -> int:
    return max(self._full.get_vocab(with_added_tokens=True).values()) + 1

  @property
  def pad_id(self) -> int:
    return self.special[self.names['pad']]

  @property
  def bos_id(self) -> int:
    return self.special[self.names['bos']] if 'bos' in self.names else -1

  @property
  def eos_id(self) -> int:
    return self.special[self.names['eos']]

  @functools.cached_property
  def fingerprint(self) -> str:
    return tokenizer_lib.fingerprint(self.to_json())

  def _plain(self, text: str) -> list[int]:
    ids = self._ordinary.encode(text, add_special_tokens=False).ids
    unknown = self._state['model'].get('unk_token')
    reserved = {i for token, i in self.special.items() if token != unknown}
    if reserved.isdisjoint(ids):
      return ids
    # A special token that is also a piece of the model itself: cut it.
    pieces = tokenizer_lib.break_special(text, self._special_pattern)
    if len(pieces) == 1:
      raise ValueError(f'content {text[:40]!r} encodes to special ids {reserved & set(ids)}')
    return [token for piece in pieces for token in self._plain(piece)]

  def encode(self, text: str, special: bool = False) -> list[int]:
    """Ids of the text; special tokens keep their ids only if `special`; none is ever added."""
    if special:
      return self._full.encode(text, add_special_tokens=False).ids
    return self._plain(text) if text else []

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Text of the ids, by the decoder of tokenizer.json; runs between specials on their own."""
    names = {i: token for token, i in self.special.items()}
    parts: list[str] = []
    run: list[int] = []
    for token in [*map(int, ids), None]:
      if token is not None and token not in names:
        run.append(token)
        continue
      parts.append(self._full.decode(run, skip_special_tokens=False) if run else '')
      parts.append(names[token] if token is not None and not skip_special else '')
      run = []
    return ''.join(parts)

  @functools.cached_property
  def _byte_level(self) -> dict[str, int] | None:
    decoder = json.dumps(self._state.get('decoder') or {})
    return _bytes_of_characters() if '"ByteLevel"' in decoder else None

  def token_bytes(self, token_id: int) -> bytes:
    """The bytes that one id stands for; IndexError names an id outside the vocabulary."""
    token = self._full.id_to_token(int(token_id))
    if token is None:
      raise IndexError(f'token id {token_id} is not in the vocabulary of {self.vocab_size}')
    if token in self.special:
      return token.encode()
    if self._byte_level:
      return bytes(self._byte_level[char] for char in token)
    if len(token) == 6 and token.startswith('<0x'):
      return bytes([int(token[3:5], 16)])
    return token.replace('\u2581', ' ').encode()

  def to_json(self) -> dict[str, Any]:
    return {'kind': 'hf', 'definition': self.definition, 'names': dict(self.names)}


_USUAL_NAMES = {
  'pad': ('<|pad|>', '<pad>', '[PAD]'),
  'bos': ('<|bos|>', '<s>', '<bos>'),
  'eos': ('<|eos|>', '</s>', '<eos>', '<|im_end|>', '<|endoftext|>'),
}
