import dataclasses
import json

import pytest

from zppo_jax.core import text
from zppo_jax.data.tasks import sources

pytest.importorskip('reasoning_gym')


def build(dataset='chain_sum', **kwargs):
  return sources.build_source({'name': 'reasoning_gym', 'dataset': dataset, **kwargs})


@pytest.mark.parametrize('dataset', ['chain_sum', 'gcd', 'basic_arithmetic', 'letter_counting'])
def test_entries_score_their_own_answer(dataset):
  import reasoning_gym

  scorer = reasoning_gym.create_dataset(dataset, size=1, seed=0)
  source = build(dataset)
  for i in range(20):
    example = source[i]
    if dataset == 'letter_counting':
      assert example.verifier == 'reasoning_gym'
      assert example.verifier_args['dataset'] == dataset
      assert example.verifier_args['entry'] == source.entry(i)
    else:  # one integer: the exact grader gives the same verdict inline
      assert example.verifier == 'numeric_exact'
    assert scorer.score_answer(example.answer, source.entry(i)) == 1.0
    assert scorer.score_answer(source.distractor(i), source.entry(i)) < 1.0
    assert text.last_boxed(example.solution) == example.answer


def test_chain_sum_is_worked_out():
  example = build(config={'min_terms': 3, 'max_terms': 3})[0]
  assert example.solution.count('=') == 2


def test_items_depend_on_nothing_but_the_index():
  long, short = build(size=5000), build(size=20)
  assert [long[i] for i in range(10)] == [short[i] for i in reversed(range(10))][::-1]
  assert json.dumps(dataclasses.asdict(long[4999]))


def test_neighbouring_seeds_and_splits_share_nothing():
  config = {'min_digits': 4, 'max_digits': 4}
  groups = [build(config=config, seed=seed, split=split)
            for seed in (0, 1) for split in ('train', 'validation', 'test')]  # fmt: skip
  questions = [{g[i].messages[0].content for i in range(60)} for g in groups]
  assert len(set().union(*questions)) == sum(map(len, questions))


def test_small_spaces_stay_disjoint_across_splits():
  config = {'min_terms': 2, 'max_terms': 2, 'min_digits': 1, 'max_digits': 1}
  parts = [{build(config=config, split=split)[i].messages[0].content for i in range(60)}
           for split in ('train', 'validation', 'test')]  # fmt: skip
  assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_data_sets_without_an_answer_have_no_solution():
  example = build('rush_hour', disjoint=False)[0]
  assert example.answer == '' and example.solution is None


@pytest.mark.parametrize(
  'spec, message',
  [
    ({'dataset': 'chain_sun'}, "closest is 'chain_sum'"),
    ({'config': {'max_term': 3}}, 'max_term'),
    ({'config': {'seed': 3}}, "'seed'.*belong to the source"),
    ({'split': 'ood'}, "split 'ood'"),
    ({'size': 10**9}, 'size 1000000000'),
    ({'datum': 1}, "closest is 'dataset'"),
  ],
)
def test_bad_specs(spec, message):
  with pytest.raises(ValueError, match=message):
    build(**spec)
