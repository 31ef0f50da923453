"""The main job end to end on a user's own file, at a size where only the plumbing counts."""

import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
STAGES = ('student', 'teacher', 'zppo', 'grpo')


def command(workdir, data):
  stages = [f'--config.{s}.model.{k}={v}' for s in STAGES
            for k, v in (('hidden', 32), ('inter', 32), ('heads', 2), ('kv_heads', 1))]
  steps = [f'--config.{s}.num_steps=3' for s in STAGES[:3]]
  sizes = [f'--config.{s}.method.num_new=8' for s in STAGES] + [
    '--config.eval.num_questions=8', '--config.eval.chunk=8', '--config.log.dump_every_steps=1']
  return [sys.executable, '-m', 'experiments.quickstart',
          '--config=ml_collections_configs/quickstart.py', f'--workdir={workdir}',
          f'--config.data.path={data}', *stages, *steps, *sizes]


def run(workdir, data):
  env = {k: v for k, v in os.environ.items() if k != 'PJRT_NPROC'}
  flags = [f for f in env['XLA_FLAGS'].split() if 'device_count' not in f]
  env |= {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join(
    [*flags, '--xla_backend_optimization_level=0'])}
  return subprocess.run(command(workdir, data), cwd=ROOT, env=env, capture_output=True, text=True,
                        check=True)


def test_own_questions_then_a_second_call(tmp_path):
  data = tmp_path / 'mine.jsonl'
  data.write_text(''.join(json.dumps(
    {'question': f'How many apples are {i} apples and {2 * i} apples in the basket?',
     'answer': f'{i}+{2 * i}={3 * i}\n#### {3 * i}'}) + '\n' for i in range(1, 61)))
  first = run(tmp_path / 'run', data)
  lines = first.stdout.splitlines()
  assert [line for line in lines if line.startswith('== ')] == [f'== {s}' for s in STAGES]
  for part in ('held-out accuracy before', 'graduated from 0/8', 'student rollouts',
               'training seconds', 'GRPO+buffer'):
    assert part in first.stdout, part
  assert [os.path.basename(p) for p in lines[-3:]] == ['learning.png', 'speed.png', 'report.html']
  assert all(os.path.getsize(p) > 0 for p in lines[-3:])
  rollouts = {}
  for stage in STAGES:
    rows = [json.loads(x) for x in (tmp_path / 'run' / stage / 'metrics.jsonl').open()]
    rollouts[stage] = sum(r.get('rollouts', 0) for r in rows)
    config = json.loads((tmp_path / 'run' / stage / 'config.json').read_text())
    assert config['data']['path'] == str(data)
    assert config['rollout']['prompt_tokens'] > 32  # widened to the file
  assert abs(rollouts['grpo'] - rollouts['zppo']) <= 80  # within one step of the baseline
  second = run(tmp_path / 'run', data)
  assert second.stdout.count('nothing left to do') == 4
  assert second.stdout.split('held-out accuracy of')[1] == first.stdout.split(
    'held-out accuracy of')[1]
