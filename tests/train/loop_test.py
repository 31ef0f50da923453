"""The loop around the step: what it logs, what it refuses, and that it compiles nothing twice."""

import dataclasses
import importlib
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from experiments.train import train
from zppo_jax.core.errors import UserError
from zppo_jax.data import tokenizer as tokenizer_lib
from zppo_jax.launch import roles, workdir
from zppo_jax.mesh import place
from zppo_jax.methods import api
from zppo_jax.replay import prompts
from zppo_jax.train import context, loop, memory, saver, state
from zppo_jax.train import run as run_lib
from zppo_jax.train import setup as setup_lib

SMALL = {'model.hidden': 32, 'model.inter': 64, 'data.eval_size': 16, 'eval.num_questions': 16,
         'eval.chunk': 16, 'log.progress': False, 'mesh.fsdp': 1, 'mesh.data': -1}
STILL = dict(method__name='zppo_ncq', method__num_new=8, method__group_size=4,
             method__buffer_capacity=16, num_steps=20, optim__learning_rate=0.0,
             rollout__max_new_tokens=8, mesh__tensor=2)


def config(name, **changes):
  found = importlib.import_module(f'ml_collections_configs.{name}').get_config('tiny')
  flat = SMALL | {k.replace('__', '.'): v for k, v in changes.items()}
  found.update_from_flattened_dict(flat)
  return found


def rows(folder, name='metrics.jsonl'):
  return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope='module')
def still(tmp_path_factory):
  """Twenty steps at learning rate 0 over 8 devices, with buffer and second phase."""
  folder = tmp_path_factory.mktemp('still')
  train(config('zppo', **STILL), str(folder))
  return folder


def test_sampler_and_scorer_agree_every_step_and_the_gap_stays_flat(still):
  gap = [r['mismatch/abs_max'] for r in rows(still) if 'mismatch/abs_max' in r]
  assert len(gap) == 20 and max(gap) < 1e-4
  assert np.mean(gap[-5:]) < 2 * np.mean(gap[:5]) + 1e-6


def test_nothing_compiles_after_the_second_step(still):
  counts = [r['compile_count'] for r in rows(still, 'timing.jsonl') if 'compile_count' in r]
  assert counts[0] > 0 and len(set(counts[1:])) == 1, counts


def test_metrics_that_a_user_must_see(still):
  last = rows(still)[-1]
  for name in ('reward/mean', 'reward/std', 'reward/zero_var_frac', 'group/pass_rate_zero',
               'response/len_mean', 'response/len_max', 'response/truncated_frac', 'loss/policy',
               'ratio/ratio_mean', 'ratio/clip_frac_low', 'ratio/clip_frac_high', 'mismatch/kl_k3',
               'entropy', 'grad_norm', 'param_norm', 'version_lag/max', 'buffer/size',
               'buffer/evicted', 'buffer/visits_mean', 'learning_rate', 'eval/accuracy'):
    assert name in last, name
  timing = rows(still, 'timing.jsonl')[-1]
  for name in ('time/rollout_policy', 'time/reward', 'time/prepare', 'time/update', 'time/step',
               'time/host_frac', 'tokens_per_s', 'memory_peak_bytes'):
    assert name in timing, name


def test_memory_of_the_step_is_said_before_it_runs(still):
  """What the shapes say of the arguments, against the compiler; a chip holds an eighth of rows."""
  found = json.loads((still / 'memory.json').read_text())
  known = sum(found['parts'].values())
  assert known == pytest.approx(found['arguments'], rel=0.1)
  assert found['temporaries'] > 0 and found['aliased'] > 0.5 * found['parts']['optimiser']
  line = memory.Memory(**found).line(2**30)
  assert 'params 0.00' in line and line.endswith('of 1 GiB per device: fits')
  assert 'DOES NOT FIT by' in memory.Memory(**found).line(1000)


def test_rollouts_can_be_read(still):
  dumped = rows(still / 'rollouts', 'step_10.jsonl')
  assert {r['kind'] for r in dumped} == {0, 2}
  assert all(r['prompt'] and set(r) >= {'response', 'parsed', 'answer', 'reward'} for r in dumped)


def test_plots_and_page_are_written(still):
  for name in ('learning.png', 'speed.png', 'report.html', 'config.json', 'command.txt', 'DONE'):
    assert (still / name).stat().st_size > 0 or name == 'DONE', name


def stopped(folder, monkeypatch, at: int):
  """Trains until a SIGTERM that comes while step `at` is saved."""
  save = saver.Saver.save

  def stop(self, step, *args, **kwargs):
    save(self, step, *args, **kwargs)
    if step == at:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
    patch.setattr(saver.Saver, 'save', stop)
    loop.train(small_run(folder))
  assert ended.value.code == 42 and workdir.latest_step(str(folder)) == at + 1


def small_run(folder):
  """Four steps with a replay buffer; answers are right by a coin."""
  run = tiny.make_run('zppo_grpo_buffer')
  return dataclasses.replace(run, workdir=str(folder), settings=run_lib.LoopSettings(
    num_steps=4, checkpoint_every=1, dump_every=0))


def test_a_run_that_was_stopped_ends_as_the_whole_one(tmp_path, monkeypatch):
  """Bit for bit. Among the slow tests, `resume_test` kills processes at any moment."""
  programs = run_lib.compile_programs(small_run(tmp_path))
  monkeypatch.setattr(loop, 'compile_programs', lambda run: programs)
  whole = loop.train(small_run(tmp_path / 'whole'))
  stopped(tmp_path / 'parts', monkeypatch, at=2)
  parts = loop.train(small_run(tmp_path / 'parts'))
  jax.tree.map(np.testing.assert_array_equal, parts, whole)
  assert int(whole.updates) > 0 and whole.method.valid.any()
  for name in ('metrics.jsonl', 'metrics.csv'):
    wanted = (tmp_path / 'whole' / name).read_bytes()
    assert wanted and (tmp_path / 'parts' / name).read_bytes() == wanted, name


def test_non_finite_gradient_stops_with_the_step_and_keeps_the_state(tmp_path):
  with pytest.raises(UserError, match=r'non-finite gradient at step 2 \(metrics not finite: \w'):
    train(config('sft', method__num_new=8, num_steps=6, optim__learning_rate=1e30,
                 optim__warmup_steps=0, log__every_steps=1, data__eval_size=8), str(tmp_path))
  assert workdir.latest_step(str(tmp_path)) == 2


def test_the_profiler_runs_in_its_window_wherever_the_run_begins(tmp_path, monkeypatch):
  """Also beyond the last step, and in a run that goes on inside the window."""
  calls, at = [], [0]
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda _: calls.append(('start', at[0])))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append(('stop', at[0])))
  run = small_run(tmp_path)
  programs = run_lib.compile_programs(run)
  monkeypatch.setattr(loop, 'compile_programs', lambda run: programs)
  real = loop.sample

  def counted(run, params, state, step, *args):
    at[0] = step
    return real(run, params, state, step, *args)

  def window(start, steps, **settings):
    return dataclasses.replace(run, settings=dataclasses.replace(
      run.settings, profile_start=start, profile_steps=steps, **settings))

  monkeypatch.setattr(loop, 'sample', counted)
  loop.train(window(1, 2, num_steps=2))  # ends inside the window
  assert calls == [('start', 0), ('stop', 1)]
  calls.clear()
  loop.train(window(1, 2))  # goes on at step 2, inside it; stops before step 3
  assert calls == [('start', 1), ('stop', 2)]
  calls.clear()
  loop.train(window(9, 2, num_steps=5))
  assert calls == []


def test_the_learning_rate_of_a_row_is_that_of_its_step(tmp_path):
  optim = state.Optim(learning_rate=1e-2, warmup_steps=4, eps=1e-2)
  run = tiny.make_run('grpo', optim=optim, iterations=1)
  loop.train(dataclasses.replace(run, workdir=str(tmp_path), settings=run_lib.LoopSettings(
    num_steps=3, dump_every=0)))
  found = [r['learning_rate'] for r in rows(tmp_path) if 'learning_rate' in r]
  wanted = [float(state.schedule(1e-2, optim)(n)) for n in range(3)]
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  assert wanted[0] < wanted[1] < wanted[2]


def test_answers_that_no_judge_could_grade_are_counted():
  class Slow(tiny.CoinGrader):
    def grade(self, texts, examples):
      rewards, results = super().grade(texts, examples)
      return rewards, [dataclasses.replace(r, reason='timeout' if i % 2 else 'wrong')
                       for i, r in enumerate(results)]

  run = tiny.make_run('grpo', grader=Slow())
  ctx = context.StepContext(run.setup, run.warm_start, step=0, version=0)
  ctx.draw([api.Group(0), api.Group(1)], capacity=2)
  assert ctx.metrics()['reward/unjudged_frac'] == 0.5
  assert ctx.metrics()['rollout/nonfinite_frac'] == 0


def test_weights_that_are_not_numbers_are_named_at_the_first_rollout(tmp_path):
  run = small_run(tmp_path)
  broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), run.warm_start)
  with pytest.raises(UserError, match='rollout: the logits of all [0-9]+ rows are not finite'):
    loop.train(dataclasses.replace(run, warm_start=broken))


def test_prompt_longer_than_the_bucket_is_named(tmp_path):
  with pytest.raises(UserError, match=r'prompt_tokens: question \w+ .* the largest bucket holds 4'):
    train(config('sft', rollout__prompt_tokens=4, num_steps=1), str(tmp_path))


def test_workdir_of_another_config_shows_the_difference(still):
  with pytest.raises(UserError, match='seed'):
    train(config('zppo', **STILL, seed=7), str(still))


def test_a_restored_buffer_of_other_questions_is_refused():
  buffer = prompts.init(4, 2)
  held = dataclasses.replace(buffer, question_id=buffer.question_id.at[0].set(9),
                             valid=buffer.valid.at[0].set(True))
  saver.check_buffers((held, jnp.zeros(3)), num_questions=10)
  with pytest.raises(UserError, match=r'question_id .*num_questions=9\), got 9'):
    saver.check_buffers((held, jnp.zeros(3)), num_questions=9)


def test_a_teacher_with_another_tokenizer_reads_and_writes_its_own(still):
  other = tokenizer_lib.build_tokenizer(dict(kind='char', pieces=('+1', '=2')))
  own = setup_lib.Questions(None, other, 'plain')
  (_, weights), questions = roles.load_teacher(None, str(still), own, place.make_mesh({'data': -1}))
  assert questions.tokenizer.fingerprint != other.fingerprint and questions.template == 'plain'
  assert weights.embed.shape[0] >= questions.tokenizer.vocab_size
  same = dataclasses.replace(own, tokenizer=questions.tokenizer)
  assert roles.load_teacher(None, str(still), same, place.make_mesh({'data': -1}))[1] is None
  with pytest.raises(UserError, match='init.checkpoint.* trained with another tokenizer'):
    roles.load_init(str(still), None, other, place.make_mesh({'data': -1}))


def test_teacher_checkpoint_must_be_a_run(tmp_path):
  (tmp_path / 'empty' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(UserError, match='no model.json'):
    train(config('distill', teacher__checkpoint=str(tmp_path / 'empty')), str(tmp_path / 'run'))
