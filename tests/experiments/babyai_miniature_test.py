"""The BabyAI miniature: its configs are sound, its bar can fail; the whole is a slow test."""

import dataclasses
import sys

import numpy as np
import pytest

from experiments import miniature
from experiments.miniatures import babyai
from zppo_jax.core.errors import UserError
from zppo_jax.launch import build, validate


@pytest.mark.parametrize('method', ['sft', 'grpo'])
def test_configs_can_run_and_plays_fit(method):
  pytest.importorskip('minigrid')
  c = babyai.config(method, seed=3, steps=8, every=4)
  assert validate.problems(c, num_devices=1) == []
  c.data.size = 100
  source = build.build_source(c, 'train')
  tokenizer = build.build_tokenizer(c, source)
  questions = build.Questions(source, tokenizer, 'plain', parser=c.agent.parser)
  prompt, _, response, _ = build.longest(questions, 100)
  assert 0 < prompt <= c.rollout.prompt_tokens and 0 < response <= c.rollout.max_new_tokens
  words = {a for i in range(100) for a in source[i].solution.split('\n')}
  assert len(words) >= 3 and all(len(tokenizer.encode(w)) == 1 for w in words), words


def test_the_bot_reaches_the_goal():
  pytest.importorskip('minigrid')
  assert 0.8 < babyai.expert_reward(8) < 1


def test_without_the_extra_it_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'minigrid', None)
  with pytest.raises(UserError, match='envs-grid'):
    babyai.run(2)


def result(first, last):
  return babyai.Result(3, 25, 48, np.linspace(first, last, 3).T, np.ones(3), 0.9)


@pytest.mark.parametrize('made, verdict', [
  (result([.3, .4, .3], [.7, .8, .75]), True), (result([.3, .4, .3], [.3, .5, .31]), False)])
def test_the_bar_passes_only_beyond_two_standard_errors(made, verdict):
  assert [b.passed for b in babyai.bars(made)] == [verdict]
  assert len(babyai.table(made)) == 2 and 'reach the goal' in babyai.notes(made)[0]
  assert babyai.record(made)['steps'] == 48


def test_one_seed_is_refused():
  with pytest.raises(ValueError, match='num_seeds must be >= 2'):
    babyai.run(1)


@pytest.mark.slow
def test_it_runs(monkeypatch, capsys):
  pytest.importorskip('minigrid')
  short = dataclasses.replace(miniature.MINIATURES['babyai'], run=lambda num_seeds: babyai.run(
    num_seeds, warm_steps=2, steps=2, evaluations=1))
  monkeypatch.setitem(miniature.MINIATURES, 'babyai', short)
  miniature.execute('babyai', 2, None)
  assert babyai.LEVEL in capsys.readouterr().out
