"""The bench of decoding at a budget: what it times, and what the pools of its trace fetch."""

import dataclasses

import numpy as np
import pytest

from experiments import bench_tls_decode as bench
from experiments.miniatures import tls_stream
from kernels import tls_attention as tls
from zppo_jax.models import config as config_lib

MODEL = config_lib.ModelConfig(
  vocab=64, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16, inter=48)
BUDGET = tls.Config(block=8, top_blocks=4, top_tokens=16, stale=True)


def test_both_sides_are_timed_on_one_model():
  configs = bench.sides(MODEL, BUDGET, 4)
  assert configs['dense'] == MODEL and configs['sparse'].sparse.kernel == BUDGET
  row = bench.measure(configs, 200, 2, 2)
  rates = {name: 2 * bench.STEPS / min(t) for name, t in row['seconds'].items()}
  assert row['tokens_per_second'] == rates and row['ratio'] == rates['sparse'] / rates['dense']


@pytest.mark.slow
def test_a_larger_pool_and_more_copies_miss_less():
  stream = tls_stream.Stream(room=2048, steps=12, rho=0.9)
  config = dataclasses.replace(tls_stream.CONFIG, top_blocks=6, top_tokens=128, stale=True)
  small, large, few, late = (
    bench.trace(stream, config, slots, misses, prefetch, 1)
    for slots, misses, prefetch in ((7, 6, True), (30, 6, True), (30, 1, True), (30, 6, False)))
  assert small['hits'] < large['hits'] < 1 and 0 < large['overlap'] <= large['hits']
  assert large['absent'] == late['absent'] == 0 and large['checksum'] == late['checksum']
  assert few['absent'] > 0 and few['checksum'] != large['checksum']
  np.testing.assert_allclose(large['bytes_per_step'], 2 * 64 * 64 * 2 * 6 * (1 - large['hits']))
