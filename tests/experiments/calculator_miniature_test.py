"""The calculator miniature: its configs are sound, its bars can fail; the whole is a slow test."""

import dataclasses

import numpy as np
import pytest

from experiments import miniature
from experiments.miniatures import calculator
from zppo_jax.launch import build, turns, validate


@pytest.mark.parametrize('method', ['sft', 'grpo'])
@pytest.mark.parametrize('tool', [True, False])
def test_configs_can_run_and_dialogues_fit(method, tool):
  c = calculator.config(method, tool=tool, seed=3, steps=8, every=4)
  assert validate.problems(c, num_devices=1) == []
  source = build.build_source(c, 'train')
  tokenizer = build.build_tokenizer(c, source)
  questions = build.Questions(source, tokenizer, 'plain', parser=c.agent.parser)
  assert bool(source[0].dialogue) == tool == (turns.build_episodes(c) is not None)
  prompt, _, response, _ = build.longest(questions, 300)
  assert prompt <= c.rollout.prompt_tokens and response <= c.rollout.max_new_tokens
  if tool:
    longest = max(len(questions.worked(source[i])[0]) for i in range(300))
    assert response == longest + 1


def result(first, last, other):
  rise = lambda low, high: np.linspace(low, high, 3).T
  return calculator.Result(3, 70, 80, {
    'with the calculator': rise(np.asarray(first), np.asarray(last)),
    'without': rise(np.zeros(3), np.asarray(other))}, np.ones(3))


@pytest.mark.parametrize('made, verdicts', [
  (result([.5, .6, .5], [.7, .8, .75], [.1, .0, .1]), [True, True]),
  (result([.5, .6, .5], [.5, .6, .55], [.1, .0, .1]), [False, True]),
  (result([.5, .6, .5], [.4, .9, .75], [.5, .7, .9]), [False, False])])
def test_bars_pass_only_beyond_two_standard_errors(made, verdicts):
  assert [b.passed for b in calculator.bars(made)] == verdicts
  assert len(calculator.table(made)) == 3 and 'calls per episode' in calculator.notes(made)[0]
  assert calculator.record(made)['steps'] == 80


def test_one_seed_is_refused():
  with pytest.raises(ValueError, match='num_seeds must be >= 2'):
    calculator.run(1)


@pytest.mark.slow
def test_it_runs(monkeypatch, capsys):
  short = dataclasses.replace(miniature.MINIATURES['calculator'], run=lambda num_seeds:
                              calculator.run(num_seeds, warm_steps=2, steps=2, evaluations=1))
  monkeypatch.setitem(miniature.MINIATURES, 'calculator', short)
  miniature.execute('calculator', 2, None)
  assert 'with the calculator' in capsys.readouterr().out
