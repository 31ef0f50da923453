"""Cases that tests and ahead-of-time compiles share, and what a decode step reads, by formula."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.tls_attention.config import Config

TOLERANCE = {'float32': 1e-5, 'bfloat16': 2e-2}  # relative RMS against the reference in float64
TILE = 128  # tokens of labels that lie together


@dataclasses.dataclass(frozen=True)
class Case:
  """Shapes of a decode step; `latent` attention has one key head and no values of its own."""

  length: int
  rows: int = 1
  heads: int = 32
  key_heads: int = 8
  width: int = 128
  value: int = 128
  labels: int = 32
  dtype: str = 'bfloat16'
  latent: bool = False

  @property
  def token_bytes(self) -> int:
    """Of the key and the value of a token and key head."""
    width = self.width if self.latent else self.width + self.value
    return width * jnp.dtype(self.dtype).itemsize


def full_bytes(case: Case) -> int:
  """Bytes that a step of full attention reads."""
  return case.rows * case.key_heads * case.length * case.token_bytes


def sparse_bytes(case: Case, config: Config) -> int:
  """Bytes that a step must read: bounds of all blocks, labels of the candidates, chosen rows."""
  blocks = -(-case.length // config.block)
  bounds = 2 * case.width * jnp.dtype(case.dtype).itemsize
  return case.rows * case.key_heads * (
    blocks * bounds + config.candidates * (case.labels // 2 + 8)
    + config.top_tokens * case.token_bytes)


def fetched_bytes(case: Case, config: Config, single_rows: bool) -> int:
  """Bytes that the TPU kernels read for it: labels come in tiles, and so do pages whose tokens lie
  along the lanes; other rows come one by one or in pages of a block."""
  tiles = config.candidates * max(1, TILE // config.block)
  pages = tiles if case.width % TILE else config.candidates
  tokens = config.top_tokens if single_rows else pages
  return sparse_bytes(case, config) + case.rows * case.key_heads * (
    (tiles - config.candidates) * (case.labels // 2 + 8)
    + (tokens - config.top_tokens) * case.token_bytes)


def label_cost(heads: int, group: int, tokens: int, labels: int, unit: int) -> pl.CostEstimate:
  """Of scoring `tokens` tokens of each of `heads` key heads, in pieces of `unit`."""
  read = tokens * (TILE // unit) * (labels // 2 + 8)
  return pl.CostEstimate(flops=heads * 2 * group * tokens * labels, transcendentals=0,
                         bytes_accessed=heads * (read + 4 * group * tokens))


def attend_cost(heads: int, group: int, tokens: int, row: int, widths: int) -> pl.CostEstimate:
  """Of attention over `tokens` rows of `row` bytes for each of `heads` key heads."""
  return pl.CostEstimate(flops=heads * 2 * group * tokens * widths,
                         transcendentals=heads * group * tokens,
                         bytes_accessed=heads * tokens * row)
