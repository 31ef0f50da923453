"""The benches' own side at a very small size, and that a failed check refuses the ratio."""

import dataclasses
import json
import types
from concurrent import futures

import jax
import numpy as np
import pytest

from experiments import bench_common as common
from experiments import bench_engine, bench_rollout, bench_train
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

  sides = {'ours': side('a', [1.0, 2.0, 4.0]), 'tunix': side('b', [3.0, 4.0, 20.0]),
           'other': side('c', [8.0, 8.0, 8.0])}
  timings = common.interleave(3, sides)
  assert order == ['a', 'b', 'c', 'c', 'b', 'a', 'a', 'b', 'c']
  row = common.summary(timings, tokens=8)['call']
  assert row['ratio'] == 3 and row['ratio_min'] == 2 and row['ratio_max'] == 5
  assert row['ratio_q1'] == 2.5 and row['ratio_q3'] == 4
  assert row['ours_tokens_per_s'] == 4 and row['tunix_tokens_per_s'] == 2
  assert row['other_ratio'] == 4 and row['other_ratio_min'] == 2 and row['other_ratio_max'] == 8
  assert row['other_seconds'] == 8 and row['other_tokens_per_s'] == 1


@pytest.fixture
def peers(monkeypatch, tmp_path):
  """Workers whose samples are ours; `spoil` changes those of the process of this number."""
  ours = bench_rollout.Ours(SPEC)
  ours.run()
  mask = np.asarray(ours.rollout.loss_mask)
  real = {k: np.asarray(x)[mask].reshape(-1, SPEC.new_tokens) for k, x in
          (('tokens', ours.rollout.tokens), ('logp', ours.rollout.behavior_logp))}
  log = types.SimpleNamespace(started=[], closed=[], spoil={})

  class Fake:
    def __init__(self, python, kind, spec, arrays, worker):
      assert (kind, spec) == ('rollout', SPEC) and arrays['prompts'].shape == (3, 6)
      self.number, self.calls = len(log.started), 0
      self.facts = {'num_params': sum(arrays[k].size for k in common.named_weights(ours.params))}
      log.started.append((python, worker.name))

    def ask(self, seed):
      self.calls += 1
      samples = log.spoil.get(self.number, lambda x: x)(dict(real))
      np.savez(tmp_path / 'samples.npz', **samples)
      seconds = {'bench_tunix.py': 6.0, 'bench_transformers.py': 4.0}[log.started[self.number][1]]
      return {'call': seconds * (5 if self.calls == 1 else 1), 'compiled': seconds / 2,
              'samples': str(tmp_path / 'samples.npz'), 'facts': {'calls': self.calls}}

    def close(self):
      log.closed.append(self.number)

  monkeypatch.setattr(common, 'Peer', Fake)
  monkeypatch.setattr(futures, 'ProcessPoolExecutor',
                      lambda n, mp_context: futures.ThreadPoolExecutor(n))
  monkeypatch.setattr(bench_rollout, 'our_first_call', lambda spec: {'call': 12.0})
  return log


def test_every_peer_has_a_ratio_and_a_first_call(peers, tmp_path, capsys):
  result = bench_rollout.bench(SPEC, pairs=3, firsts=2, peer_python='a', transformers_python='b',
                               out=str(tmp_path))
  tunix, transformers = ('a', 'bench_tunix.py'), ('b', 'bench_transformers.py')
  # two that stay, then the fresh ones; who goes first alternates
  assert peers.started == [tunix, transformers, tunix, transformers, transformers, tunix]
  assert sorted(peers.closed) == list(range(6))
  ours = np.asarray(result['seconds']['call']['ours'])
  assert result['seconds']['call']['tunix'] == [6.0] * 3  # the warm-up took 30
  assert result['results']['call']['ratio'] == pytest.approx(np.median(6 / ours))
  assert result['results']['call']['transformers_ratio'] == pytest.approx(np.median(4 / ours))
  assert result['results']['compiled']['transformers_seconds'] == 2
  assert result['seconds']['first'] == {'ours': [12.0] * 2, 'tunix': [30.0] * 2,
                                        'transformers': [20.0] * 2}
  assert result['results']['first']['ratio'] == 2.5
  assert result['peers']['transformers'] == {'num_params': result['peers']['tunix']['num_params'],
                                             'calls': 4}
  lines = capsys.readouterr().out.splitlines()
  assert any(x.split()[:3] == ['first', 'tunix', '30.00'] and x.endswith(
    'ratio 2.50 (quartiles 2.50-2.50, range 2.50-2.50, 2 pairs), our time 0.40 of its')
    for x in lines)
  assert json.loads((tmp_path / 'rollout.json').read_text()) == result
  assert (tmp_path / 'rollout.png').stat().st_size > 0


@pytest.mark.parametrize('python, name', [('peer_python', 'tunix'),
                                          ('transformers_python', 'transformers')])
def test_a_peer_runs_alone(python, name, peers):
  result = bench_rollout.bench(SPEC, pairs=1, **{python: 'a'})
  assert list(result['peers']) == [name] and list(result['seconds']['call']) == ['ours', name]
  assert peers.started == [('a', f'bench_{name}.py')] and 'first' not in result['results']


@pytest.mark.parametrize('number', [0, 1, 3])  # of both that stay, and of a fresh one
@pytest.mark.parametrize('what, spoil', [
  ('sampler against our scorer', lambda x: x | {'logp': x['logp'] + 1e-2}),
  ('sampler against our scorer', lambda x: x | {'logp': x['logp'] * np.nan}),
  ('tokens, missing: 6', lambda x: {k: v[:, 1:] for k, v in x.items()})])
def test_a_wrong_peer_refuses(number, what, spoil, peers, capsys):
  peers.spoil[number] = spoil
  with pytest.raises(common.Refused, match=f'{("tunix", "transformers")[number % 2]} {what}'):
    bench_rollout.bench(SPEC, pairs=1, firsts=1, peer_python='a', transformers_python='b')
  assert 'tokens/s' not in capsys.readouterr().out
  assert sorted(peers.closed) == list(range(len(peers.started)))


@pytest.mark.slow
def test_our_first_call_compiles_in_a_process_of_its_own(monkeypatch, tmp_path):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
  ours = bench_rollout.Ours(SPEC)
  ours.run()  # compiled here, which must not help
  warm = min(ours.run()['call'] for _ in range(3))
  cached = jax.config.jax_enable_compilation_cache
  found = bench_rollout.first_calls(ours, {}, 1)['first']
  assert list(found) == ['ours'] and found['ours'][0] > 10 * warm
  assert not list(tmp_path.iterdir())  # the cache was off
  assert jax.config.jax_enable_compilation_cache == cached


def test_a_peer_runs_without_the_compilation_cache(monkeypatch, tmp_path):
  script = tmp_path / 'python'
  script.write_text('#!/bin/sh\nread line\necho "{\\"cache\\": $JAX_ENABLE_COMPILATION_CACHE}"\n')
  script.chmod(0o755)
  monkeypatch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'true')
  peer = common.Peer(str(script), 'rollout', SPEC, {})
  peer.close()
  assert peer.facts == {'cache': False}


def test_a_dead_peer_is_a_user_error(tmp_path):
  script = tmp_path / 'python'
  script.write_text('#!/bin/sh\necho no such library >&2\nexit 1\n')
  script.chmod(0o755)
  with pytest.raises(common.UserError, match='no such library'):
    common.Peer(str(script), 'rollout', SPEC, {})


def test_the_engine_bench_counts_steps_and_compiles():
  """A short queue: equal tokens are required inside; steps, occupancy and compiles are counted."""
  load = bench_engine.Load(requests=8, slots=2, steps=4, median=6, most=24)
  found = bench_engine.run(dataclasses.replace(common.PRESETS['tiny'], group=1), load, 1)
  assert found['tokens'] == int(bench_engine.lengths(load).sum())
  assert found['compiles_after_warm_up'] == 0 and found['decode_steps'] < found['fixed_steps']
  assert 0.5 < found['occupancy'] <= found['occupancy_while_waiting'] <= 1
