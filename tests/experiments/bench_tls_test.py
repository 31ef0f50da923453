"""The bench of sparse decoding: it measures what it says, and refuses wrong outputs."""

import numpy as np
import pytest

from experiments import bench_common, bench_tls
from kernels import tls_attention as tls
from kernels.tls_attention import chunked, shapes

SHAPE = shapes.Case(1024, heads=4, key_heads=2, width=32, value=32, labels=8, dtype='float32')
CONFIG = tls.Config(block=64, top_blocks=4, top_tokens=64)


def test_a_row_has_a_ratio_and_the_bytes_that_are_read():
  row = bench_tls.measure(SHAPE, CONFIG, 1)
  assert row['ratio'] == row['best']['full'] / row['best']['sparse'] > 0
  assert row['bytes'] == {'full': 2 * 1024 * 64 * 4, 'sparse': 2 * (
    16 * 64 * 4 + 256 * (4 + 8) + 64 * 64 * 4)}
  assert 0 < row['error_to_full'] < np.inf  # random keys have no few tokens that matter


def test_a_wrong_output_is_refused(monkeypatch):
  right = chunked.attend
  monkeypatch.setattr(chunked, 'attend', lambda *args: 1.01 * right(*args))
  with pytest.raises(bench_common.Refused, match='chosen tokens'):
    bench_tls.measure(SHAPE, CONFIG, 1)


def test_the_slope_is_that_of_a_power():
  rows = [dict(shape=dict(length=n), best=dict(sparse=3e-6 * n**0.4)) for n in (1000, 8000, 64000)]
  np.testing.assert_allclose(bench_tls.slope(rows), 0.4, rtol=1e-6)
