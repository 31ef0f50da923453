"""The bench of block-table attention: it measures what it says, and refuses wrong numbers."""

import jax.numpy as jnp
import pytest

from experiments import bench_blocks, bench_common
from kernels.tls_attention import block_chunked

SHAPE = bench_blocks.Shape(256, heads=2, width=16, block=32, query_tile=32, top=4)


def test_a_row_has_ratios_of_minima():
  row = bench_blocks.measure(SHAPE, 2)
  for name in ('top', 'half'):
    assert row['ratio'][name] == min(row['seconds']['dense']) / min(row['seconds'][name]) > 0


def test_wrong_numbers_are_refused(monkeypatch):
  right = block_chunked._einsum
  monkeypatch.setattr(block_chunked, '_einsum', lambda *args: right(*args) * jnp.float32(1.001))
  with pytest.raises(bench_common.Refused, match='to the reference'):
    bench_blocks.measure(SHAPE, 1)
