"""Two-level sparse attention as it is written, one row and head at a time, in float64 NumPy."""

from __future__ import annotations

import numpy as np

from kernels.tls_attention.config import Config


def dense(q, key, value, length, scale):
  """Softmax attention of [HQ, D] over the first `length` of [HK, N, D], for one row."""
  group = q.shape[0] // key.shape[0]
  out = np.zeros((q.shape[0], value.shape[-1]))
  for head, query in enumerate(np.asarray(q, np.float64)):
    keys, values = (np.asarray(x[head // group, :length], np.float64) for x in (key, value))
    weight = np.exp(scale * keys @ query - np.max(scale * keys @ query))
    out[head] = weight @ values / weight.sum()
  return out


def best(scores, k):
  """Indices of the k largest, ties by the lowest index, -inf never; in rising order."""
  order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
  return sorted(i for i in order[:k] if scores[i] > -np.inf)


def blocks_of(q, key, length, config: Config):
  """[(scores, chosen blocks)] per key head of one row; q [HQ, D], key [HK, N, D]."""
  group, found = q.shape[0] // key.shape[0], []
  count = -(-length // config.block)
  for head, keys in enumerate(np.asarray(key, np.float64)):
    queries = np.asarray(q, np.float64)[head * group:(head + 1) * group]
    scores = []
    for j in range(count):
      inside = keys[j * config.block:min((j + 1) * config.block, length)]
      high, low = inside.max(0), inside.min(0)
      scores.append(max(np.maximum(query * high, query * low).sum() for query in queries))
    forced = [np.inf if j < config.sink_blocks or j == count - 1 else s
              for j, s in enumerate(scores)]
    found.append((scores, best(forced, config.top_blocks)))
  return found


def label(row):
  """A label after its way through 4 bits."""
  row = np.asarray(row, np.float32)
  zero = row.min()
  scale = np.float32((row.max() - zero) / np.float32(15))
  code = np.round((row - zero) / (scale if scale > 0 else np.float32(1)))
  return (zero + code * scale).astype(np.float64)


def tokens_of(q, key, blocks, channels, length, config: Config, scale):
  """(numbers of the candidate tokens, their scores, chosen numbers) of one key head.

  q [G, D] are its query heads, key [N, D].
  """
  at = [t for j in blocks for t in range(j * config.block, min((j + 1) * config.block, length))]
  labels = np.stack([label(np.asarray(key)[t][channels]) for t in at])
  logits = scale * np.asarray(q, np.float64)[:, channels] @ labels.T
  if config.reduce == 'softmax_max':
    top = logits.max(1, keepdims=True)
    logits = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
  scores = logits.max(0)
  return at, scores, [at[i] for i in best(scores, config.top_tokens)]


def attend(q, key, value, at, scale):
  """Exact attention of [G, D] over the tokens `at` of one head."""
  keys, values = (np.asarray(x, np.float64)[at] for x in (key, value))
  logits = scale * np.asarray(q, np.float64) @ keys.T
  weight = np.exp(logits - logits.max(1, keepdims=True))
  return weight @ values / weight.sum(1, keepdims=True)


def decode(q, key, value, channels, length, config: Config, scale):
  """Synchronous decoding of a batch: (out [B, HQ, V], chosen token numbers per row and head)."""
  rows, heads, _ = q.shape
  group = heads // key.shape[1]
  out, sets = np.zeros((rows, heads, value.shape[-1])), []
  for b in range(rows):
    found = blocks_of(q[b], key[b], int(length[b]), config)
    sets.append([])
    for h, (_, blocks) in enumerate(found):
      part = slice(h * group, (h + 1) * group)
      _, _, at = tokens_of(q[b, part], key[b, h], blocks, np.asarray(channels[h]), int(length[b]),
                           config, scale)
      out[b, part] = attend(q[b, part], key[b, h], value[b, h], at, scale)
      sets[-1].append(at)
  return out, sets
