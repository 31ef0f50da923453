"""The benches' own side at a very small size, and that a failed check refuses the ratio."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import bench_common as common
from experiments import bench_rollout, bench_train
from zppo_jax.sampling import decode

SPEC = common.Spec(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, inter=16, vocab=32,
                   prompts=3, group=2, prompt_tokens=6, new_tokens=5)


@pytest.mark.parametrize('bench', [bench_rollout.bench, bench_train.bench])
def test_our_side_runs_alone_and_says_so(bench, tmp_path, capsys):
  result = bench(SPEC, pairs=2, out=str(tmp_path))
  assert 'only our own figures, no ratio' in capsys.readouterr().out
  for part in common.PARTS:
    assert result['results'][part]['ours_tokens_per_s'] > 0
    assert 'ratio' not in result['results'][part]
  assert json.loads((tmp_path / f'{result["name"]}.json').read_text())['tokens'] > 0
  assert (tmp_path / f'{result["name"]}.png').stat().st_size > 0


@pytest.mark.parametrize('bench, error', [(bench_rollout.bench, 1e-2),
                                          (bench_rollout.bench, np.nan),
                                          (bench_train.bench, 1e-2)])
def test_a_broken_log_prob_refuses(bench, error, monkeypatch, capsys):
  real = decode.generate

  def broken(*args, **kwargs):
    rollout = real(*args, **kwargs)
    logp = rollout.behavior_logp.at[1].add(rollout.loss_mask[1] * error)
    return dataclasses.replace(rollout, behavior_logp=logp)

  monkeypatch.setattr(decode, 'generate', broken)
  with pytest.raises(common.Refused, match='our sampler against'):
    bench(SPEC, pairs=1)
  assert 'tokens/s' not in capsys.readouterr().out


def test_a_missing_token_refuses():
  ours = bench_rollout.Ours(SPEC)
  ours.run()
  mask = ours.rollout.loss_mask.at[0, SPEC.prompt_tokens].set(False)
  ours.rollout = dataclasses.replace(ours.rollout, loss_mask=mask)
  with pytest.raises(common.Refused, match='our tokens, missing: 1'):
    common.require(ours.checks())


def test_rows_of_rebuilds_the_rollout_that_was_sampled():
  ours = bench_rollout.Ours(SPEC)
  ours.run()
  mask = np.asarray(ours.rollout.loss_mask)
  responses = np.asarray(ours.rollout.tokens)[mask].reshape(-1, SPEC.new_tokens)
  rows = bench_rollout.rows_of(SPEC, ours.prompts, responses)
  for name in ('tokens', 'segment_ids', 'positions', 'loss_mask', 'group_id', 'traj_tokens'):
    np.testing.assert_array_equal(getattr(rows, name), getattr(ours.rollout, name), err_msg=name)


def test_ratios_are_paired_and_the_order_alternates():
  order = []

  def side(name, seconds):
    def run():
      order.append(name)
      return dict.fromkeys(common.PARTS, seconds.pop(0))

    return run

  timings = common.interleave(3, side('a', [1.0, 2.0, 4.0]), side('b', [3.0, 4.0, 20.0]))
  assert order == ['a', 'b', 'b', 'a', 'a', 'b']
  row = common.summary(timings, tokens=8)['call']
  assert row['ratio'] == 3 and row['ratio_min'] == 2 and row['ratio_max'] == 5
  assert row['ours_tokens_per_s'] == 4 and row['tunix_tokens_per_s'] == 2


def test_a_dead_peer_is_a_user_error(tmp_path):
  script = tmp_path / 'python'
  script.write_text('#!/bin/sh\necho no such library >&2\nexit 1\n')
  script.chmod(0o755)
  with pytest.raises(common.UserError, match='no such library'):
    common.Peer(str(script), 'rollout', SPEC, {})
