"""Conversations in slots: a row pauses after its answer and goes on from its cache later.

A request is the whole conversation so far as token ids. What a slot holds of it already is not run
again; the rest is appended in chunks of static length. So an agent, a tool or an environment may
take any time between two answers, and no text is ever tokenised twice. Noise belongs to (key, name,
sample, index), so that slots, chunks and company change no token.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from zppo_jax.core.errors import UserError
from zppo_jax.mesh import hosts
from zppo_jax.models.config import DELTA_KINDS, ModelConfig
from zppo_jax.models.params import Params
from zppo_jax.sampling import decode
from zppo_jax.sampling import slots as slots_lib
from zppo_jax.sampling.engine import Stop


@dataclasses.dataclass(frozen=True)
class Shape:
  """Shapes of the programs: rows, tokens of the longest conversation, and tokens per program."""

  slots: int
  context: int
  steps: int = 16  # decoded between two looks of the host
  chunks: tuple[int, ...] = (32, 256)  # appended at once


@dataclasses.dataclass(frozen=True)
class Request:
  """Draw at most max_tokens behind `tokens`; (name, sample) name the noise."""

  tokens: tuple[int, ...]
  max_tokens: int
  name: int = 0  # u32
  sample: int = 0


@dataclasses.dataclass(frozen=True)
class Answer:
  """`tokens` with their log-probs; `stopped` by a stop token or string, which it then ends with, or
  by a `fault`: logits that are not finite."""

  tokens: tuple[int, ...]
  logp: tuple[float, ...]
  stopped: bool
  log_kept_mass: tuple[float, ...] | None
  reused: int  # tokens of the request that the cache held
  fault: bool = False


@dataclasses.dataclass
class _Held:
  """What a slot holds, and which request it works on; `used` orders idle slots by age."""

  tokens: tuple[int, ...] = ()
  anchors: dict[int, int] = dataclasses.field(default_factory=dict)  # length -> hash up to there
  work: int | None = None
  used: int = 0
  seen: int = 0  # response tokens that a stop was looked for in


def _chunk(chunks: Sequence[int], longest: int) -> int:
  """The smallest that holds `longest` tokens and is not mostly padding, or else the largest that
  they fill."""
  fits = [c for c in chunks if longest <= c <= 2 * longest]
  return min(fits, default=max((c for c in chunks if c <= longest), default=min(chunks)))


class Conversations:
  """Slots that outlive a call. Weights of another `version` make them forget everything."""

  def __init__(self, config: ModelConfig, shape: Shape):
    for name, value in (('slots', shape.slots), ('context', shape.context - 1),
                        ('steps', shape.steps), ('chunks', min(shape.chunks, default=0))):
      if value < 1:
        raise ValueError(f'shape.{name}: {getattr(shape, name)} is too small')
    if jax.process_count() > 1:
      raise UserError(f'slots: one process is needed so far, the run has {jax.process_count()}')
    self.config, self.shape = config, shape
    # A recurrence cannot be cut, nor can the weights of the channels of labels.
    self._whole = bool(set(config.mixers) & set(DELTA_KINDS)) or config.sparse is not None
    self._slots, self._held, self._facts, self._clock = None, [], None, 0
    self._params = self._blocks = None
    self._weights = np.random.default_rng(0).integers(2**63, size=shape.context, dtype=np.uint64)

  def check(self, request: Request, settings: decode.Settings) -> None:
    """Raises ValueError naming what does not fit."""
    size, room = len(request.tokens), self.shape.context
    if not size:
      raise ValueError('request: the prompt is empty')
    if not 1 <= request.max_tokens <= settings.max_new_tokens:
      raise ValueError(f'max_tokens must lie in 1..{settings.max_new_tokens}, '
                       f'got {request.max_tokens}')
    if size + request.max_tokens > room:
      raise ValueError(f'request: {size} tokens and {request.max_tokens} new ones are more than '
                       f'the context of {room}')
    if not 0 <= min(request.tokens) <= max(request.tokens) < self.config.vocab:
      raise ValueError(f'request: token ids must lie in 0..{self.config.vocab - 1}')

  def generate(self, params: Params, requests: Sequence[Request], *, key: jax.Array,
               settings: decode.Settings, version: int = 0, stop: Stop | None = None
               ) -> list[Answer]:
    """Answers in the order of the requests. Raises ValueError on one that does not fit."""
    decode.check_settings(settings)
    for request in requests:
      self.check(request, settings)
    if any(h.work is not None for h in self._held):  # an earlier call was interrupted
      self._slots = None
    self._renew(key, settings, version)
    if self._params is not params:  # a turn must not copy all weights
      self._params, self._blocks = params, slots_lib.split_blocks(self.config, params)
    blocks = self._blocks
    hashes = [self._hashes(r.tokens) for r in requests]
    answers: list[Answer | None] = [None] * len(requests)
    reused: dict[int, int] = {}
    left = collections.deque(range(len(requests)))
    while left or any(h.work is not None for h in self._held):
      if left and (placed := self._place(left, requests, hashes)):
        reused |= self._admit(blocks, placed, requests, key, settings)
      self._slots, _, _ = slots_lib.steps(self.config, blocks, self._slots, most=self.shape.steps,
                                          settings=settings)
      s = self._slots
      found = hosts.fetch((s.active, s.tokens, s.logp, s.length, s.done, s.kept, s.fault))
      for slot, size, stopped in self._ended(found, stop):
        work, (_, tokens, logp, length, _, kept, fault) = self._held[slot].work, found
        tokens, logp, kept = (None if x is None else tuple(x[slot, :size].tolist())
                              for x in (tokens, logp, kept))
        broken = bool(fault[slot]) and not stopped  # a stop string came before the fault
        answers[work] = Answer(tokens, logp, stopped, kept, reused[work], broken)
        self._clock += 1
        if broken:
          self._held[slot] = _Held(used=self._clock)
        else:
          self._hold(slot, requests[work].tokens, tokens, cut=size < length[slot])
    return answers

  def _hold(self, slot: int, asked: tuple[int, ...], said: tuple[int, ...], *, cut: bool) -> None:
    """Notes what a slot holds now, and up to where others may share it: the ends of all turns."""
    tokens, known = asked + said, self._held[slot].anchors
    if self._whole:
      ends = () if cut else (len(tokens),)
      tokens = () if cut else tokens
    else:
      ends = (*(n for n in known if n < len(asked)), len(asked), len(tokens))
    hashes = self._hashes(tokens)
    anchors = {n: int(hashes[n]) for n in ends}
    # The slot's logits stand behind what was cut off: one token must be run again for its own.
    self._held[slot] = _Held((*tokens, -1) if cut and tokens else tokens, anchors, used=self._clock)

  def _hashes(self, tokens: tuple[int, ...]) -> np.ndarray:
    """Entry n is a hash of the first n tokens, u64[len + 1]."""
    ids = np.asarray(tokens, np.uint64) + np.uint64(1)
    sums = np.cumsum(ids * self._weights[:len(tokens)], dtype=np.uint64)
    return np.concatenate([np.zeros(1, np.uint64), sums])

  def _renew(self, key, settings, version: int) -> None:
    """Slots are made anew for other settings, and forgotten with other weights."""
    if self._slots is None or self._facts[0] != settings:
      self._slots = slots_lib.empty(self.config, key, rows=self.shape.slots,
                                    size=self.shape.context, prompt=self.shape.context,
                                    settings=settings)
      self._facts = None
    if self._facts != (settings, version):
      self._held = [_Held() for _ in range(self.shape.slots)]
    self._facts = settings, version

  def _shared(self, slot: int, tokens: tuple[int, ...], at: int) -> int:
    """Tokens of a request that a slot need not run again, which agree up to an anchor `at`. One is
    run for its logits, unless the slot holds just these tokens."""
    held = self._held[slot].tokens
    if held[:at] != tokens[:at]:
      return 0
    return at if len(held) == at else min(at, len(tokens) - 1)

  def _place(self, left, requests, hashes) -> list[tuple[int, int, int]]:
    """(slot, request, tokens shared) of what starts now: first where a slot holds a part of it,
    the longest parts first, then in the oldest idle slots."""
    idle = {i: self._held[i] for i in range(self.shape.slots) if self._held[i].work is None}
    holders = collections.defaultdict(list)
    for i, h in idle.items():
      for pair in h.anchors.items():
        holders[pair].append(i)
    lengths = sorted({n for n, _ in holders}, reverse=True)
    found = []
    for at, work in enumerate(left):
      h = hashes[work]
      found += [(n, -at) for n in lengths if n < len(h) and (n, int(h[n])) in holders]
    waiting, chosen = list(left), {}
    for n, at in sorted(found, reverse=True):
      work = waiting[-at]
      slot = next((i for i in holders[n, int(hashes[work][n])] if i in idle), None)
      if -at not in chosen and slot is not None:
        if shared := self._shared(slot, requests[work].tokens, n):
          chosen[-at] = slot, work, shared
          del idle[slot]
    oldest = collections.deque(sorted(idle, key=lambda i: (self._held[i].used, i)))
    for at in range(len(waiting)):
      if at not in chosen and oldest:
        chosen[at] = oldest.popleft(), waiting[at], 0
    left.clear()
    left.extend(work for at, work in enumerate(waiting) if at not in chosen)
    for slot, work, _ in chosen.values():
      self._held[slot].work = work
    return [chosen[at] for at in sorted(chosen)]

  def _admit(self, blocks, placed, requests, key, settings) -> dict[int, int]:
    """Appends what is missing, once per distinct conversation, and starts the rows."""
    rows, room = self.shape.slots, self.shape.context
    first: dict[tuple[int, ...], int] = {}  # conversation -> the slot that runs it
    source, held, reused = {}, np.zeros(rows, np.int32), {}
    for slot, work, shared in placed:
      tokens = requests[work].tokens
      reused[work] = held[slot] = shared
      if tokens in first and not shared:
        source[slot], reused[work] = first[tokens], len(tokens)
      first.setdefault(tokens, slot)
    missing = {slot: requests[work].tokens[shared:] for slot, work, shared in placed
               if slot not in source}
    self._append(blocks, held, missing)
    if source:
      target = np.full(rows, rows, np.int32)
      origin = np.zeros(rows, np.int32)
      target[:len(source)], origin[:len(source)] = list(source), list(source.values())
      self._slots = slots_lib.copy(self._slots, origin, target)
    prompt, here = np.zeros((rows, room), np.int32), np.zeros(rows, bool)
    facts = np.zeros((4, rows), np.int64)
    for slot, work, shared in placed:
      r = requests[work]
      known = {} if slot in source else self._held[slot].anchors
      self._held[slot].anchors = {n: h for n, h in known.items() if n <= shared}
      prompt[slot, :len(r.tokens)], here[slot] = r.tokens, True
      facts[:, slot] = len(r.tokens), r.name, r.sample, r.max_tokens
      self._held[slot].tokens, self._held[slot].seen = r.tokens, 0
    length, name, sample, limit = facts
    row = (prompt, length.astype(np.int32), name.astype(np.uint32), sample.astype(np.int32),
           limit.astype(np.int32))
    self._slots = slots_lib.start(self.config, self._slots, key, here, row, settings=settings)
    return reused

  def _append(self, blocks, held: np.ndarray, missing: dict[int, tuple[int, ...]]) -> None:
    while longest := max((len(t) for t in missing.values()), default=0):
      size = _chunk(self.shape.chunks, longest)
      tokens = np.zeros((self.shape.slots, size), np.int32)
      length = np.zeros(self.shape.slots, np.int32)
      for slot, rest in missing.items():
        length[slot] = min(size, len(rest))
        tokens[slot, :length[slot]] = rest[:size]
      self._slots = slots_lib.append(self.config, blocks, self._slots, held, tokens, length)
      held = held + length  # a new array: the program may still read the old one
      missing = {slot: rest[size:] for slot, rest in missing.items()}

  def _ended(self, found, stop: Stop | None):
    """(slot, tokens, by a stop) of the rows that are over; they decode no more."""
    active, tokens, _, length, done, *_ = found
    over = []
    for slot, h in enumerate(self._held):
      if h.work is None:
        continue
      size = int(length[slot])
      at = None if stop is None else stop(tokens[slot, :size], h.seen)
      h.seen = size
      if at is not None:
        over.append((slot, at, True))
      elif not active[slot]:
        over.append((slot, size, bool(done[slot])))
    if any(active[slot] for slot, _, _ in over):
      gone = {slot for slot, _, _ in over}
      stay = np.asarray([i not in gone for i in range(self.shape.slots)])
      self._slots = slots_lib.release(self._slots, stay)
    return over
