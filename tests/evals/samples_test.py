"""Evaluation: rows on disk, going on after a stop, and what the summary says."""

import importlib
import json

import numpy as np
import pytest

from experiments import evaluate as cli
from experiments.train import train
from zppo_jax.core.errors import UserError
from zppo_jax.evals import samples

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
