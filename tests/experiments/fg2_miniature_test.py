"""The recall tasks say what they should, and the bars read the right arms."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.miniatures import fg2_gdn as mini
from experiments.miniatures import fg2_tasks as tasks


def test_stream_targets_are_what_was_written_last():
  task = dataclasses.replace(tasks.Stream(), batch=3)
  x, target, asked = (np.asarray(a) for a in tasks.stream_batch(jax.random.key(0), task))
  key, value, op = x[..., :8], x[..., 8:16], x[..., 16:].argmax(-1)
  for row in range(3):
    held = {}
    for t in range(task.length):
      name = tuple(np.round(key[row, t], 3))
      if asked[row, t]:
        np.testing.assert_allclose(target[row, t], held.get(name, np.zeros(8)), atol=1e-6)
        assert not value[row, t].any()
      else:
        held[name] = value[row, t] if op[row, t] == 0 else np.zeros(8)
    assert 0 < asked[row].sum() < task.length


def test_recall_labels_are_the_overwritten_values():
  task = tasks.Recall(batch=4)
  tokens, labels, asked = (np.asarray(a) for a in tasks.recall_batch(jax.random.key(0), task))
  assert tokens.shape == (4, task.length)
  written = 2 * (task.pairs + task.overwrites)
  for row in range(4):
    held = {}
    for t in range(0, written, 2):
      held[tokens[row, t]] = tokens[row, t + 1]
    assert len(held) == task.pairs and not asked[row, :written].any()
    for t in range(written, task.length):
      assert asked[row, t] and labels[row, t] == held[tokens[row, t]]


@pytest.mark.slow
def test_arms_share_weights_and_data_and_learn():
  keys = jax.vmap(jax.random.key)(np.arange(2))
  task = tasks.Stream(steps=60, batch=8, length=20)
  kda, decoupled = (np.asarray(tasks.train(keys, arm=a, task=task))
                    for a in ('kda', 'scalar_decoupled'))
  assert kda.shape == (2, 60)
  assert kda[:, -10:].mean() < kda[:, :5].mean()
  assert not np.allclose(kda, decoupled)


def test_bars_fail_when_the_arms_are_exchanged():
  flat = lambda x: np.full((2, 40), x)
  good = mini.Result(2, mini.STREAM, mini.RECALL,
                     dict(kda=flat(.08), fg2_gdn=flat(.082), scalar_decoupled=flat(.01),
                          fg2_gdn_plus=flat(.012)),
                     dict(gdn=flat(.66), kda=flat(.8), fg2_gdn=flat(.6), fg2_gdn_plus=flat(.82)))
  assert all(b.passed for b in mini.bars(good)) and len(mini.table(good)) == 8
  bad = good._replace(stream=dict(good.stream, kda=flat(.012), fg2_gdn_plus=flat(.08)),
                      recall=dict(good.recall, kda=flat(.9), gdn=flat(.8)))
  assert [b.passed for b in mini.bars(bad)] == [False] * 5


@pytest.mark.slow
def test_erasing_without_writing_at_full_length():
  keys = jax.vmap(jax.random.key)(np.arange(3))
  error = {a: mini.final(np.asarray(tasks.train(keys, arm=a, task=mini.STREAM))).mean()
           for a in tasks.STREAM_ARMS}
  assert error['fg2_gdn_plus'] < 0.4 * error['kda']
  assert error['scalar_decoupled'] < 0.4 * error['kda']
  assert abs(error['fg2_gdn'] / error['kda'] - 1) < 0.15
