"""The stream and the needles are what they say, and the bars read the right arms."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import miniature
from experiments.miniatures import tls as mini
from experiments.miniatures import tls_needle as needle
from experiments.miniatures import tls_stream as stream
from zppo_jax.models import params as params_lib

SMALL = stream.Stream(room=2048, steps=3)
TASK = needle.Needles(context=64, needles=6, stages=((32, 4, 2),), part=2, most=1)


def test_keys_have_unit_norm_heavy_channels_and_planted_topics():
  drawn = stream.draw(SMALL, 0)
  key = np.asarray(drawn.key)[0, 0]
  np.testing.assert_allclose(np.linalg.norm(key, axis=-1), 1, atol=1e-5)
  spread = np.sort(key.std(0))
  assert (spread[-12:] > 1.8 * np.median(spread[:-12])).all()
  assert int(drawn.planted.sum()) == SMALL.topics * SMALL.planted
  assert drawn.queries.shape == (1 + SMALL.steps, 1, SMALL.heads, SMALL.width)
  lengths = np.linalg.norm(drawn.queries, axis=-1)
  np.testing.assert_allclose(lengths, SMALL.sharpness * SMALL.width**0.5, rtol=1e-5)
  strong = stream.draw(dataclasses.replace(SMALL, planted_norm=20.), 0)
  cosine = np.asarray(strong.queries)[0, 0].mean(0) @ np.asarray(strong.key)[0, 0].T
  assert np.asarray(strong.planted)[np.argsort(-cosine)[:40]].all()


def test_budgets_of_the_stream():
  """More tokens hold more; a budget of everything is dense; rho 1 keeps the blocks."""
  drawn, config = stream.draw(SMALL, 0), dataclasses.replace(stream.CONFIG, top_blocks=8)
  few, many = (stream.play(drawn, s=SMALL, config=dataclasses.replace(config, top_tokens=n))
               for n in (64, 256))
  for arm in stream.ARMS:
    assert (np.asarray(many.mass[arm]) >= np.asarray(few.mass[arm]) - 1e-4).all(), arm
  every = stream.play(drawn, s=SMALL, config=dataclasses.replace(
    config, top_blocks=32, top_tokens=2048))
  assert max(float(np.max(x)) for x in every.error.values()) < 1e-4
  assert min(float(np.min(x)) for x in every.mass.values()) > 1 - 1e-4
  still = dataclasses.replace(SMALL, rho=1.0)
  trace = stream.play(stream.draw(still, 0), s=still, config=config)
  assert not np.asarray(trace.new).any()
  np.testing.assert_allclose(trace.mass[mini.SYNC], trace.mass[mini.STALE], atol=1e-5)


def test_needles_lie_whole_in_the_context_and_answers_are_theirs():
  contexts, asked = map(np.asarray, needle.rows(jax.random.key(0), TASK, 64, 6, 6, 3))
  assert contexts.shape == (3, 64) and asked.shape == (3, 6, TASK.longest)
  for tokens, questions in zip(contexts.tolist(), asked.tolist()):
    assert len({q[1] for q in questions}) == 6
    for ask, key, again, *value in questions:
      assert ask == needle.ASK and key == again and tokens.count(key) == 1
      at = tokens.index(key)
      assert tokens[at + 1:at + 1 + TASK.characters] == value
    assert sum(t >= TASK.vocab - TASK.fillers for t in tokens) == 64 - 6 * 3


def test_every_arm_answers_and_a_budget_of_all_keys_is_dense():
  """Of a model that knows nothing: what it would say is decided by all keys."""
  params = params_lib.init(needle.model(TASK), jax.random.key(0))
  prompts, wanted = needle.questions(TASK, 0, 3)
  assert np.asarray(prompts.forced).shape == (3, 3) and wanted.shape == (3, TASK.characters)
  dense = needle.answer(TASK, params, prompts, None)
  same = needle.answer(TASK, params, prompts, needle.budget(TASK, 5, 80))
  np.testing.assert_array_equal(same, dense)
  stale = needle.answer(TASK, params, prompts, needle.budget(TASK, 3, 16, True))
  assert stale.shape == dense.shape == wanted.shape


def test_arms_spend_the_same_tokens():
  arms = needle.arms(needle.Needles(), 64, 16)
  kernels = {name: how.kernel for name, how in arms.items() if how}
  assert {k.top_tokens for k in kernels.values()} == {64}
  assert kernels[mini.QUEST].top_blocks * kernels[mini.QUEST].block == 64
  assert kernels['Double Sparsity'].candidates >= 512 + needle.Needles().longest
  assert [n for n, k in kernels.items() if k.stale] == [mini.STALE]


def result(mass=.98, error=.04, new=.09, **right):
  """A made-up one of two seeds and three steps."""
  flat = lambda x: np.full((2, 3), x)
  arms = {a: .6 for a in stream.ARMS} | {mini.STALE: error, mini.SYNC: error / 2}
  trace = stream.Trace({a: flat(x) for a, x in arms.items()},
                       {a: flat(mass) for a in stream.ARMS}, flat(new), flat(.02))
  right = {'dense': .99, mini.QUEST: .5, 'Double Sparsity': .99, mini.SYNC: .98,
           mini.STALE: .98} | right
  recall = {a: np.full(2, right.get(a, .9)) for a in mini.needle_arms(needle.Needles())}
  return mini.Result(2, stream.Stream(), needle.Needles(),
                     dict.fromkeys(mini.cases(stream.Stream()), trace), recall)


def test_bars_pass_and_fail_where_they_should():
  good = result()
  assert all(b.passed for b in mini.bars(good)) and len(mini.notes(good)) == 4
  verdicts = lambda r: [b.passed for b in mini.bars(r)]
  assert verdicts(result(mass=.94)) == [False, True] * 3 + [True] * 6
  assert verdicts(result(error=.2)) == [True, False] * 3 + [True] * 6
  assert verdicts(result(new=.21)) == [True] * 6 + [False] + [True] * 5
  assert verdicts(result(dense=.94, **{mini.STALE: .91})) == (
    [True] * 7 + [False, True, True, False, True])
  assert verdicts(result(**{mini.QUEST: .95})) == [True] * 8 + [True, False] * 2
  assert [p.shape[0] for arms in mini.panels(good).values() for p in arms.values()] == [2] * 14


def test_one_seed_is_refused():
  with pytest.raises(ValueError, match='num_seeds must be >= 2'):
    mini.run(1)


@pytest.mark.slow
def test_it_runs(monkeypatch, tmp_path):
  """From training to the picture, at sizes that show nothing."""
  task = dataclasses.replace(needle.Needles(), stages=((32, 4, 2),), part=2, most=1)
  short = dataclasses.replace(miniature.MINIATURES['asynctls'], run=lambda num_seeds: mini.run(
    num_seeds, stream=stream.Stream(steps=2), needles=task, count=4))
  monkeypatch.setitem(miniature.MINIATURES, 'asynctls', short)
  miniature.execute('asynctls', 2, str(tmp_path))
  assert {p.name for p in tmp_path.iterdir()} == {'asynctls.json', 'asynctls.png'}
