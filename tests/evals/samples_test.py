"""Evaluation: rows on disk, going on after a stop, and what the summary says."""

import importlib
import json
import math

import numpy as np
import pytest

from experiments import evaluate as cli
from experiments.train import train
from zppo_jax.core.errors import UserError
from zppo_jax.evals import samples
from zppo_jax.launch import roles
from zppo_jax.ops import intervals

SMALL = {'model.hidden': 32, 'model.inter': 64, 'data.eval_size': 16, 'eval.num_questions': 6,
         'eval.chunk': 4, 'log.progress': False, 'mesh.fsdp': 1, 'mesh.data': -1}


def config(name, **changes):
  found = importlib.import_module(f'ml_collections_configs.{name}').get_config('tiny')
  found.update_from_flattened_dict(SMALL | {k.replace('__', '.'): v for k, v in changes.items()})
  return found


@pytest.fixture(scope='module')
def warm(tmp_path_factory):
  folder = tmp_path_factory.mktemp('evaluate') / 'warm'
  train(config('sft', num_steps=4, method__num_new=64, optim__learning_rate=5e-3,
               rollout__prompt_tokens=32, rollout__max_new_tokens=40), str(folder),
        report_paths=False)
  return folder


def test_samples_on_disk_do_not_depend_on_chunks_or_stops(warm, tmp_path):
  def call(name, ks=(1, 4), **changes):
    c = config('grpo', init__checkpoint=str(warm), eval__samples=4, rollout__max_new_tokens=40,
               **changes)
    found = cli.evaluate(c, str(tmp_path / name), ks)
    return found, (tmp_path / name / 'samples.jsonl').read_text()

  found, text = call('whole')
  rows = [json.loads(line) for line in text.splitlines()]
  assert [(r['question'], r['sample']) for r in rows] == [divmod(i, 4) for i in range(24)]
  assert len({r['text'] for r in rows[:4]}) > 1
  assert call('other', eval__chunk=8)[1] == text
  broken = tmp_path / 'whole' / 'samples.jsonl'
  broken.write_text(text[:len(text) // 2])  # in the middle of a line and of a question
  assert call('whole') == (found, text)
  stored = json.loads((tmp_path / 'whole' / 'results.json').read_text())
  assert stored['questions'] == 6 and stored['results'] == found
  assert found['avg@4']['mean'] == pytest.approx(np.mean([r['reward'] for r in rows]))
  for ks in ((5,), (0, 1), ()):
    with pytest.raises(UserError, match=r'--k must lie in 1..eval.samples = 4'):
      call('whole', ks=ks)


def test_weights_must_be_given(tmp_path):
  with pytest.raises(UserError, match='init.checkpoint'):
    cli.evaluate(config('grpo'), str(tmp_path), [1])


def test_summary_counts_questions_and_not_samples():
  rows = [dict(question=q, sample=s, reward=float(s < q), parsed='x' if s < q else str(s),
               truncated=s == 3) for q in range(5) for s in range(4)]
  found = samples.summarise(rows, (1, 2, 4))
  assert found['avg@4']['mean'] == found['pass@1']['mean'] == pytest.approx(0.5)
  assert found['pass@4']['mean'] == pytest.approx(4 / 5)
  assert found['all@4']['mean'] == pytest.approx(1 / 5)
  assert found['pass@2']['mean'] == pytest.approx(np.mean([0, 1 / 2, 5 / 6, 1, 1]))
  assert found['maj@4']['mean'] == pytest.approx(4 / 5)  # one right answer appears first
  assert found['truncated']['mean'] == 0.25 and found['unread']['mean'] == 0
  assert found['pass@4']['error'] == pytest.approx(np.std([0, 1, 1, 1, 1], ddof=1) / 5**0.5)
  assert found['pass@4']['low'] <= 0.8 <= found['pass@4']['high']
  with pytest.raises(ValueError, match='at most the samples of a question, 4, got 8'):
    samples.summarise(rows, (8,))


def test_samples_of_other_weights_are_refused(tmp_path):
  path = tmp_path / 'samples.jsonl'
  path.write_text(json.dumps(dict(question=0, sample=0, weights='A at step 3')) + '\n')
  with pytest.raises(UserError, match='holds samples of A at step 3, .* those of A at step 4'):
    samples._read(str(path), 1, 'A at step 4')
  assert len(samples._read(str(path), 1, 'A at step 3')) == 1
  path.write_text(json.dumps(dict(question=0, sample=0)) + '\n')
  with pytest.raises(UserError, match='holds samples of unnamed weights'):
    samples._read(str(path), 1, 'A at step 3')


def test_weights_are_named_by_step_or_by_file(tmp_path):
  (tmp_path / 'checkpoints' / '3').mkdir(parents=True)
  assert roles.weights_name(str(tmp_path)) == f'{tmp_path} at step 3'
  (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='qwen3')))
  (tmp_path / 'model.safetensors').write_bytes(b'abc')
  first = roles.weights_name(str(tmp_path))
  (tmp_path / 'model.safetensors').write_bytes(b'abcd')
  assert 'at step' not in first and roles.weights_name(str(tmp_path)) != first


def rows_of(rewards, parsed=None):
  """One question per list of rewards."""
  return [dict(question=q, sample=s, reward=reward, truncated=False,
               parsed=str(s) if parsed is None else parsed[s])
          for q, row in enumerate(rewards) for s, reward in enumerate(row)]


def test_samples_without_a_score_are_left_out_and_counted():
  found = samples.summarise(rows_of([[1.0, None], [0.0, 1.0], [None, None]]), (1, 2))
  assert found['avg@2']['mean'] == found['pass@1']['mean'] == 0.75  # (1 + .5) / 2 questions
  assert found['pass@2']['mean'] == 1 and math.isnan(found['pass@2']['error'])  # one question
  assert found['unscored']['mean'] == 0.5


def test_votes_go_to_values_and_ties_are_shared():
  found = samples.summarise(rows_of([[0.0, 0.0, 1.0, 1.0, 1.0]], [
    '7', '7', '1/2', '0.5', '\\frac{1}{2}']), (5,))
  assert found['maj@5']['mean'] == found['maj@5_frac']['mean'] == 1
  found = samples.summarise(rows_of([[0.0, 1.0]], ['7', '8']), (2, 2))
  assert found['maj@2']['mean'] == 0 and found['maj@2_frac']['mean'] == 0.5
  assert math.isnan(found['maj@2']['error'])


def test_intervals_of_few_questions_are_those_of_students_t():
  row = samples.summarise(rows_of([[1.0], [0.0], [1.0], [1.0], [1.0]]), (1, 1, 1))['avg@1']
  assert row['error'] == pytest.approx(0.2)
  assert row['low'] == pytest.approx(0.8 - 2.7764 * 0.2, abs=1e-4)
  assert intervals.normal(0.5, 0.1, 100) == pytest.approx((0.304, 0.696), abs=1e-4)


def test_must_resume_wants_samples(warm, tmp_path):
  c = config('grpo', init__checkpoint=str(warm), rollout__max_new_tokens=40)
  with pytest.raises(UserError, match='resume=must, but there is no samples.jsonl'):
    cli.evaluate(c, str(tmp_path / 'none'), [1], resume='must')
