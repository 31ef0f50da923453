"""Batches: memo, lazy pool, deadlines; and the checks of rewards."""

import threading
import time

import numpy as np
import pytest

from zppo_jax.core.errors import RewardError
from zppo_jax.core.types import Example
from zppo_jax.rewards import grade, verifiers


def example(uid='q', gold='7', verifier='numeric_exact', **args):
  return Example(uid, (), gold, verifier, args)


def test_grades_in_order_without_a_process():
  with grade.Grader() as grader:
    rewards, results = grader.grade([r'\boxed{7}', r'\boxed{8}', '7'], [example()] * 3)
    assert not grader._pool._workers
  assert rewards.dtype == np.float32 and list(rewards) == [1, 0, 0]
  assert [r.parsed for r in results] == ['7', '8', None]
  assert [r.reason for r in results] == ['correct', 'wrong', 'no answer']


def test_thousands_of_short_answers_per_second():
  rows = [example(str(i), str(i % 37), 'math') for i in range(4000)]
  responses = [f'<think>{i}</think> so \\boxed{{{i % 50}}}' for i in range(4000)]
  with grade.Grader() as grader:
    start = time.perf_counter()
    grader.grade(responses, rows)
    seconds = time.perf_counter() - start
    assert not grader._pool._workers
  assert seconds < 2.0  # about .1 s on an idle core


def test_equal_answers_to_one_question_are_judged_once(monkeypatch):
  judged = []

  def judge(answer, row):
    judged.append((row.uid, answer))
    return verifiers.VerifyResult(1.0, answer, 'correct')

  monkeypatch.setitem(verifiers.VERIFIERS, 'exact', verifiers.Verifier(judge))
  rows = [example('a', verifier='exact'), example('a', verifier='exact')]
  rows += [example('b', verifier='exact'), example('a', verifier='exact')]
  responses = [r'\boxed{1}', r'so \boxed{1}', r'\boxed{1}', r'\boxed{2}']
  with grade.Grader() as grader:
    rewards, _ = grader.grade(responses, rows)
  assert judged == [('a', '1'), ('b', '1'), ('a', '2')] and rewards.sum() == 4


def test_hanging_answer_scores_zero_within_the_deadline():
  import reasoning_gym

  entry = reasoning_gym.create_dataset('countdown', seed=1, size=1)[0]
  row = example('c', entry['answer'], 'reasoning_gym', dataset='countdown', entry=entry)
  backtrack = example('r', '', 'regex', pattern='(a+)+b')
  answers = [r'\boxed{9**9**9}', f'\\boxed{{{entry["answer"]}}}', '\\boxed{' + 'a' * 60 + '}']
  with grade.Grader(deadline_s=1.0) as grader:
    start = time.monotonic()
    rewards, results = grader.grade(answers, [row, row, backtrack])
    assert time.monotonic() - start < 25
  assert list(rewards) == [0, 1, 0]
  assert [r.reason for r in results] == ['timeout', 'correct', 'timeout']


def test_graders_may_be_called_from_threads():
  rows, out = [example('m', 'x^2+2x+1', 'math')] * 2, {}
  with grade.Grader(num_workers=1) as grader:
    work = lambda i: out.update({i: grader.grade([r'\boxed{(x+1)^2}', r'\boxed{x}'], rows)[0]})
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  assert [list(out[i]) for i in range(3)] == [[1, 0]] * 3


def test_lengths_must_agree():
  with grade.Grader() as grader, pytest.raises(RewardError, match='2 responses for 1'):
    grader.grade(['a', 'b'], [example()])


BAD_REWARDS = [
  (1.0, 2, r'shape \[\]'),
  ([1.0], 2, r'shape \[1\]'),
  ([[1.0], [0.0]], 2, r'shape \[2, 1\]'),
  ([1.0, None], 2, r'outcome\[1\] is None'),
  ([float('nan'), 1.0], 2, r'outcome\[0\] = nan'),
  ([0.0, float('inf')], 2, r'outcome\[1\] = inf'),
  ([0.0, -1.0], 2, r'outcome\[1\] = -1.0'),
  ([0.0, 1.5], 2, r'outcome\[1\] = 1.5'),
  ([0.0, 0.5], 2, r'outcome\[1\] = 0.5.*allow_fractional'),
  ([0.0, 'x'], 2, r"outcome\[1\] = 'x'"),
]


@pytest.mark.parametrize('rewards, num_rows, message', BAD_REWARDS)
def test_check_rewards_names_row_and_value(rewards, num_rows, message):
  with pytest.raises(RewardError, match=message):
    grade.check_rewards(rewards, num_rows, name='outcome')


def test_check_rewards_passes_good_ones():
  out = grade.check_rewards([True, 0, np.float32(1)], 3)
  assert out.dtype == np.float32 and list(out) == [1, 0, 1]
  assert list(grade.check_rewards([0.25], 1, allow_fractional=True)) == [0.25]
  assert grade.check_rewards([], 0).shape == (0,)


def test_combine_reweights_what_applies():
  rewards = {'answer': [1.0, 0.0, None], 'format': [0.0, None, 0.5]}
  out = grade.combine(rewards, {'answer': 3.0, 'format': 1.0})
  np.testing.assert_allclose(out, [0.75, 0.0, 0.5])
  np.testing.assert_allclose(grade.combine({'a': [1, 0], 'b': [0, 0]}), [0.5, 0])


BAD_COMBINE = [
  ({'a': [None, 1], 'b': [None, 1]}, None, 'row 0'),
  ({'a': [1], 'b': [1, 0]}, None, 'one value per row'),
  ({'a': [1]}, {'b': 1.0}, 'weights for'),
  ({'a': [1]}, {'a': 0.0}, "weight of 'a'"),
  ({'a': [float('nan')]}, None, r'a\[0\] = nan'),
]


@pytest.mark.parametrize('rewards, weights, message', BAD_COMBINE)
def test_combine_refuses(rewards, weights, message):
  with pytest.raises(RewardError, match=message):
    grade.combine(rewards, weights)


def test_normalise_distinct_keeps_first_spellings():
  found = grade.normalise_distinct(['1/2', None, '0.5', r'\frac12', '3', 'x', ' x ', '3.0', 'X'])
  assert found == ['1/2', '3', 'x', 'X']
  assert grade.normalise_distinct(['North', r'\text{north}', 'south']) == ['North', 'south']
