"""Reports: readable plots, a page without outside files, gaps and hostile text survived."""

import json
import re

import numpy as np
import pytest

from zppo_jax.core.errors import UserError
from zppo_jax.train import metrics, report, report_page


def make_run(path, num_steps=40, *, with_buffer=True):
  (path / 'rollouts').mkdir(parents=True)
  with metrics.MetricWriter(path) as writer:
    for step in range(1, num_steps + 1):
      row = {'reward/mean': step / num_steps, 'response/len_mean': 20.0, 'entropy': 1 / step}
      row |= {'tokens_per_s': 1000.0, 'mismatch/kl_k3': float('nan') if step == 3 else 1e-6}
      if with_buffer:
        row['buffer/size'] = step
      writer.write_scalars(step, row)
      if step % 10 == 0:
        writer.write_scalars(step, {'eval/accuracy': step / num_steps / 2})
  for step in (9, 10):
    rows = [{'prompt': f'<p>{i}', 'response': f'<b>{step}', 'reward': i % 2} for i in range(6)]
    text = ''.join(json.dumps(row) + '\n' for row in rows) + '{"prompt": "to'
    (path / 'rollouts' / f'step_{step}.jsonl').write_text(text)
  return str(path)


def test_series_skip_what_is_not_finite(tmp_path):
  series = report.read_series(make_run(tmp_path / 'a'))
  assert len(series['reward/mean'][0]) == 40 and len(series['mismatch/kl_k3'][0]) == 39
  assert series['eval/accuracy'] == ([10, 20, 30, 40], [0.125, 0.25, 0.375, 0.5])
  assert report.summarise(series) == {
    'steps': 40,
    'accuracy, first': 0.125,
    'accuracy, best': 0.5,
    'accuracy, last': 0.5,
    'training reward, last 5 %': pytest.approx(0.9875),
  }


def test_rollouts_are_the_newest_and_mixed(tmp_path):
  rows = report.read_rollouts(make_run(tmp_path / 'a'), 4)
  assert [row['step'] for row in rows] == [10] * 4
  assert [row['reward'] for row in rows] == [1, 1, 0, 0]
  assert len(report.read_rollouts(str(tmp_path / 'a'), 100)) == 6
  assert report.read_rollouts(str(tmp_path)) == []


def test_smoothing_is_a_centred_mean():
  np.testing.assert_allclose(report.smooth([1, 2, 3, 4, 5], 1), [1, 2, 3, 4, 5])
  np.testing.assert_allclose(report.smooth([1, 2, 6, 4, 5], 3), [1.5, 3, 4, 5, 4.5])


def test_whole_report(tmp_path):
  runs = {
    'grpo': make_run(tmp_path / 'a', with_buffer=False),
    'z<ppo>': make_run(tmp_path / 'b', 60),
  }
  table = [{'run': 'grpo', 'accuracy': 0.12345, 'note': None}, {'run': '<x>', 'extra': 3}]
  paths = report.write_report(runs, str(tmp_path / 'out'), title='A & B', table=table, notes='N')
  assert [path.rpartition('/')[2] for path in paths] == ['learning.png', 'speed.png', 'report.html']
  with open(paths[0], 'rb') as file:
    assert file.read(8) == b'\x89PNG\r\n\x1a\n'
  page = open(paths[2], encoding='utf-8').read()
  assert page.count('data:image/png;base64,') == 2
  assert not re.search(r'(?:src|href)="(?!data:)', page)
  for text in ('A &amp; B', 'z&lt;ppo&gt;', '&lt;p&gt;1', '0.1235', '\u2013', '<td>3</td>'):
    assert text in page
  assert '<p>1' not in page and '<x>' not in page


def test_single_short_run_without_extras(tmp_path):
  with metrics.MetricWriter(tmp_path / 'a') as writer:
    writer.write_scalars(1, {'reward/mean': 0.5})
  paths = report.write_report({'only': str(tmp_path / 'a')}, str(tmp_path / 'out'))
  assert [path.rpartition('/')[2] for path in paths] == ['learning.png', 'report.html']


@pytest.mark.parametrize('runs', [{}, {'gone': '/nonexistent/run'}])
def test_nothing_to_report_is_an_error(tmp_path, runs):
  with pytest.raises(UserError, match='no metrics.jsonl'):
    report.write_report(runs, str(tmp_path / 'out'))


def test_empty_table():
  assert report_page.render_table([]) == ''
