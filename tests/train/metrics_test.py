"""Metric files: contents, crash safety, resume; progress, phase times, compile counter."""

import csv
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zppo_jax.train import compiles, metrics, progress


def lines(path):
  return path.read_text().splitlines()


def write_run(workdir, first, last, after_step=-1):
  with metrics.MetricWriter(workdir, after_step=after_step) as writer:
    for step in range(first, last + 1):
      writer.write_scalars(step, {'loss': np.float32(1 / step), 'time/step': 0.1, 'n': step})
      if step % 2 == 0:
        writer.write_scalars(step, {'eval/accuracy': step / 10})


def test_results_and_readings_go_to_their_own_files(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    writer.write_scalars(
      1, {'b': jnp.float32(0.1), 'a': 2, 'time/x': 0.5, 'tokens_per_s': 9.0, 'ok': True}
    )
    writer.write_scalars(2, {'memory_peak': 7, 'compile_count': 3})
  assert lines(tmp_path / 'metrics.jsonl') == ['{"step": 1, "a": 2, "b": 0.1, "ok": 1}']
  assert [json.loads(line) for line in lines(tmp_path / 'timing.jsonl')] == [
    {'step': 1, 'time/x': 0.5, 'tokens_per_s': 9.0},
    {'step': 2, 'compile_count': 3, 'memory_peak': 7},
  ]
  assert lines(tmp_path / 'metrics.csv') == ['step,a,b,ok', '1,2,0.1,1']


def test_table_grows_new_columns(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    writer.write_scalars(1, {'b': 1})
    writer.write_scalars(2, {'a': 5, 'b': 2})
    writer.write_scalars(3, {'b': 3})
  rows = list(csv.DictReader(io.StringIO((tmp_path / 'metrics.csv').read_text())))
  assert rows == [
    {'step': '1', 'b': '1', 'a': ''},
    {'step': '2', 'b': '2', 'a': '5'},
    {'step': '3', 'b': '3', 'a': ''},
  ]


def test_each_row_is_on_disk_at_once(tmp_path):
  writer = metrics.MetricWriter(tmp_path)
  writer.write_scalars(1, {'a': 1, 'time/x': 2})
  assert [len(lines(tmp_path / name)) for name in ('metrics.jsonl', 'timing.jsonl')] == [1, 1]
  assert len(lines(tmp_path / 'metrics.csv')) == 2
  writer.close()


@pytest.mark.parametrize('stopped_at', [4, 5, 7])
def test_resumed_files_equal_unbroken_ones(tmp_path, stopped_at):
  write_run(tmp_path / 'whole', 1, 9)
  write_run(tmp_path / 'broken', 1, stopped_at)
  for name in ('metrics.jsonl', 'metrics.csv', 'timing.jsonl'):
    with open(tmp_path / 'broken' / name, 'a') as file:
      file.write('{"step": 99, "loss": 0.')  # torn by a crash
  write_run(tmp_path / 'broken', 5, 9, after_step=4)
  for name in ('metrics.jsonl', 'metrics.csv', 'timing.jsonl'):
    whole, broken = tmp_path / 'whole' / name, tmp_path / 'broken' / name
    assert whole.read_bytes() == broken.read_bytes()
  assert not list((tmp_path / 'broken').glob('*.tmp'))


def test_new_run_starts_empty_files(tmp_path):
  write_run(tmp_path, 1, 5)
  metrics.MetricWriter(tmp_path).close()
  assert [(tmp_path / n).read_text() for n in ('metrics.jsonl', 'metrics.csv', 'timing.jsonl')] == [
    '', 'step\n', ''
  ]  # fmt: skip


def test_readers_skip_torn_and_foreign_lines(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_bytes(b'{"step": 1}\nnot json\n[1]\n{"loss": 2}\n\xff\xfe\n{"step": 2}\n{"step": 3}')
  assert metrics.read_rows(path) == [{'step': 1}, {'step': 2}]
  assert metrics.read_rows(tmp_path / 'absent') == []


def test_non_finite_values_are_valid_json(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    writer.write_scalars(1, {'a': float('nan'), 'b': np.float32('-inf')})
  assert lines(tmp_path / 'metrics.jsonl') == ['{"step": 1, "a": "nan", "b": "-inf"}']


@pytest.mark.parametrize('bad', [np.ones(2), 'x', None, 1j])
def test_only_single_numbers(tmp_path, bad):
  with metrics.MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match="'loss'"):
    writer.write_scalars(1, {'loss': bad})


def test_disabled_writer_writes_nothing(tmp_path):
  with metrics.MetricWriter(tmp_path / 'w', enabled=False) as writer:
    writer.write_scalars(1, {'a': 1})
    writer.flush()
  assert not (tmp_path / 'w').exists()


def test_tensorboard(tmp_path):
  with metrics.MetricWriter(tmp_path, tensorboard=True) as writer:
    writer.write_scalars(1, {'a': 1.0, 'time/x': 2.0})
    writer.flush()
  assert list(tmp_path.glob('events.out.*'))


def test_phase_timer_adds_up_and_starts_again():
  now = [0.0]
  timer = metrics.PhaseTimer(clock=lambda: now[0])
  for _ in range(2):
    with timer('rollout'):
      now[0] += 1.5
  with pytest.raises(KeyError), timer('update'):
    now[0] += 2.0
    raise KeyError
  assert timer.take() == {'time/rollout': 3.0, 'time/update': 2.0}
  assert timer.take() == {}


def test_progress_lines():
  stream, now = io.StringIO(), [0.0]
  bar = metrics.Progress(
    10, start_step=4, every=2, stream=stream, interactive=False, clock=lambda: now[0]
  )
  for step in range(5, 11):
    now[0] += 30.0
    readings = {'eval/accuracy': 0.5} if step == 5 else {}
    bar.update(step, {'reward/mean': 0.25, 'loss': 0.1, 'tokens_per_s': 12345.6, **readings})
  bar.close()
  assert stream.getvalue().splitlines() == [
    'step 6/10  reward 0.25  accuracy 0.5  loss 0.1  tokens/s 12,346  ETA 2m00s',
    'step 8/10  reward 0.25  accuracy 0.5  loss 0.1  tokens/s 12,346  ETA 1m00s',
    'step 10/10  reward 0.25  accuracy 0.5  loss 0.1  tokens/s 12,346',
  ]


def test_progress_bar_on_a_terminal():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  stream = Terminal()
  with metrics.Progress(3, stream=stream) as bar:
    for step in (1, 2, 3):
      bar.update(step, {'loss': 0.5})
  assert '3/3' in stream.getvalue() and 'loss=0.5' in stream.getvalue()


def test_progress_can_be_silent():
  stream = io.StringIO()
  with metrics.Progress(3, stream=stream, enabled=False) as bar:
    bar.update(3, {'loss': 1})
  assert stream.getvalue() == ''


@pytest.mark.parametrize('seconds, text', [(0.2, '0s'), (59.6, '1m00s'), (200, '3m20s'),
                                           (7500, '2h05m'), (-1, '0s')])  # fmt: skip
def test_format_seconds(seconds, text):
  assert progress.format_seconds(seconds) == text


def test_compile_counter_counts_programs_once():
  compiles.install()
  compiles.install()
  function = jax.jit(lambda x: x * 3 + 1)
  arguments = [jnp.ones(n) for n in (3, 3, 5)]
  before, seconds = compiles.count(), compiles.seconds()
  for argument, want in zip(arguments, (1, 1, 2)):
    function(argument)
    assert compiles.count() - before == want
  assert compiles.seconds() > seconds
