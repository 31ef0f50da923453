"""Log-probs of given continuations, many prompts in few shapes."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from zppo_jax.core import masks
from zppo_jax.mesh import axes, hosts
from zppo_jax.models import decoder
from zppo_jax.models.config import ModelConfig
from zppo_jax.models.params import Params
from zppo_jax.ops import logprobs

SHORTEST = 64  # tokens of the smallest program; the others are its doubles
AT_ONCE = 1024  # positions whose logits are held at once
Pair = tuple[Sequence[int], Sequence[int]]  # prompt, which is not empty, and continuation


def score(config: ModelConfig, params: Params, pairs: Sequence[Pair], *,
          tokens_per_call: int = 4096, track: Callable[[Sequence], Iterable] = iter
          ) -> list[tuple[np.ndarray, np.ndarray]]:
  """(log-prob in nats f32[n], whether it is the most likely token bool[n]) of each continuation.

  At temperature 1, in the order of the pairs; `track` goes around the calls, for a progress bar.
  Raises ValueError on an empty prompt.
  """
  if any(not len(prompt) for prompt, _ in pairs):
    raise ValueError('a prompt must not be empty')
  found: list = [None] * len(pairs)
  for size, rows, names in track(list(_calls([len(a) + len(b) - 1 for a, b in pairs],
                                             tokens_per_call))):
    given, length = np.zeros((rows, size + 1), np.int32), np.zeros(rows, np.int32)
    for row, i in enumerate(names):
      ids = [*pairs[i][0], *pairs[i][1]]
      given[row, :len(ids)], length[row] = ids, len(ids) - 1
    logp, greedy = hosts.fetch(_score(config, params, given[:, :-1], given[:, 1:], length,
                                      chunk=max(1, AT_ONCE // rows)))
    for row, i in enumerate(names):
      part = slice(len(pairs[i][0]) - 1, length[row])
      found[i] = logp[row, part], greedy[row, part]
  return found


def _calls(sizes: Sequence[int], tokens: int) -> Iterator[tuple[int, int, list[int]]]:
  """(tokens of a row, rows, which pairs) of each program, few shapes, the longest first."""
  buckets = collections.defaultdict(list)
  for i, size in enumerate(sizes):
    buckets[max(SHORTEST, 1 << (size - 1).bit_length())].append(i)
  for size in sorted(buckets, reverse=True):
    rows = max(1, tokens // size)
    for begin in range(0, len(buckets[size]), rows):
      yield size, rows, buckets[size][begin:begin + rows]


@functools.partial(jax.jit, static_argnames=('config', 'chunk'))
def _score(config: ModelConfig, params: Params, tokens: jax.Array, targets: jax.Array,
           length: jax.Array, *, chunk: int) -> tuple[jax.Array, jax.Array]:
  """(log-prob f32[B, T], whether it is the argmax bool[B, T]) of targets[t] behind tokens[:t + 1].

  Of `length` tokens per row; nothing behind them counts.
  """
  hidden = decoder.forward(
    config, params, axes.constrain(tokens, 'batch', None), want='hidden',
    segment_ids=masks.segments_from_lengths(length, tokens.shape[1])).hidden

  def some(hidden, targets):
    logits = decoder.unembed(config, params, hidden)
    return logprobs.logprobs(logits, targets)[0], jnp.argmax(logits, axis=-1) == targets

  return logprobs.map_tokens(some, (hidden, targets), chunk=chunk, axis=1)
