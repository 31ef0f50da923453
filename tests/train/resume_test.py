"""A run that is killed again and again ends where the unbroken one does, bit for bit."""

import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SMALL = ('--config.model.hidden=32', '--config.model.inter=64', '--config.data.eval_size=16',
         '--config.eval.num_questions=16', '--config.eval.chunk=16',
         '--config.rollout.prompt_tokens=32', '--config.rollout.max_new_tokens=40')
WARM = ('--config.num_steps=60', '--config.optim.learning_rate=5e-3',
        '--config.log.every_steps=50')
STEPS, KILLS = 14, 10


def command(config, workdir, cache, *extra):
  return [sys.executable, '-m', 'experiments.train',
          f'--config=ml_collections_configs/{config}:tiny',
          f'--workdir={workdir}', f'--config.launch.compilation_cache={cache}', *SMALL, *extra]


def environment(devices=1):
  """What is tested is what a run does, not how fast."""
  env = {k: v for k, v in os.environ.items() if k != 'PJRT_NPROC'}
  flags = [f for f in env['XLA_FLAGS'].split() if 'device_count' not in f]
  flags += ['--xla_backend_optimization_level=0',
            f'--xla_force_host_platform_device_count={devices}']
  return env | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join(flags)}


def run(args, devices=1):
  return subprocess.run(args, cwd=ROOT, env=environment(devices), capture_output=True, text=True,
                        check=True)


def newest(workdir):
  """Step of the newest complete checkpoint, -1 before the first."""
  try:
    names = os.listdir(os.path.join(workdir, 'checkpoints'))
  except FileNotFoundError:
    return -1
  return max((int(n) for n in names if n.isdecimal()), default=-1)


def final_state(workdir):
  """(arrays of the host, meta), whatever devices they were saved from."""
  folder = os.path.join(workdir, 'checkpoints')
  with ocp.CheckpointManager(folder, item_names=('state', 'pending', 'meta')) as manager:
    meta = manager.restore(STEPS, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
  path = os.path.join(folder, str(STEPS), 'state')
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.metadata(path).item_metadata.tree
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree,
                         is_leaf=lambda x: hasattr(x, 'shape'))
    return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain)), meta


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A compilation cache and a warm start that solves some questions, so that steps change
  weights; one for all workers of a session."""
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent
  folder = folder / 'resume'
  folder.mkdir(exist_ok=True)
  with open(folder / 'lock', 'w', encoding='utf-8') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (folder / 'warm' / 'DONE').exists():
      run(command('sft.py', folder / 'warm', folder / 'cache', *WARM))
  return folder


def zppo(base, name, *extra):
  """With a replay buffer; a start is mostly tracing, so the second phase is for one test."""
  return command('zppo.py', base / name, base / 'cache', '--config.method.name=zppo_grpo_buffer',
                 '--config.method.num_new=8', '--config.method.buffer_capacity=16',
                 f'--config.init.checkpoint={base / "warm"}', f'--config.num_steps={STEPS}',
                 '--config.eval.every_steps=5', '--config.ckpt.every_steps=1', *extra)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(base):
  """The last one is a SIGTERM, which saves first and asks for a restart."""
  run(zppo(base, 'whole'))
  rng = random.Random(0)
  name, killed_at = 'broken', []
  broken = base / name
  for i in range(KILLS):
    process = subprocess.Popen(zppo(base, name), cwd=ROOT, env=environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while newest(broken) < i and process.poll() is None:
      time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.4))  # in a step, in a checkpoint, or in a metrics row
    last = i + 1 == KILLS
    process.send_signal(signal.SIGTERM if last else signal.SIGKILL)
    assert process.wait() == (42 if last else -signal.SIGKILL)
    killed_at.append(newest(broken))
  assert max(killed_at) < STEPS, 'the run ended before the last kill: it proves nothing'
  run(zppo(base, name, '--resume=must'))
  whole, broken = final_state(base / 'whole'), final_state(broken)
  jax.tree.map(np.testing.assert_array_equal, whole[0], broken[0])
  assert int(whole[0]['updates']) > 0 and whole[0]['method']['valid'].any()
  assert whole[1]['stream'] == broken[1]['stream']
  for file in ('metrics.jsonl', 'metrics.csv'):
    assert (base / 'whole' / file).read_bytes() == (base / name / file).read_bytes(), file


@pytest.mark.slow
def test_second_run_says_that_it_is_done(base):
  before = (base / 'warm' / 'metrics.jsonl').read_bytes()
  done = run(command('sft.py', base / 'warm', base / 'cache', *WARM))
  assert 'nothing left to do' in done.stdout
  assert (base / 'warm' / 'metrics.jsonl').read_bytes() == before


@pytest.mark.slow
def test_sigterm_saves_and_stale_rollouts_resume_too(base):
  """With a teacher in the prompt too: its answers and the coin of BCQ come back the same."""
  extra = ('--config.max_staleness=2', '--config.allow_uncorrected_staleness=True',
           '--config.method.name=zppo', '--config.method.tau=1.0', '--config.method.compress=tail',
           '--config.method.compress_tokens=16', '--config.rollout.reformulated_tokens=264',
           '--config.method.teacher_group_size=8', '--config.method.teacher_chunk=8',
           f'--config.teacher.checkpoint={base / "warm"}')
  run(zppo(base, 'stale', *extra))
  broken = zppo(base, 'stale_broken', *extra, '--config.ckpt.every_steps=100')
  process = subprocess.Popen(broken, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
  seen = base / 'stale_broken' / 'metrics.jsonl'
  while not seen.exists() or len(seen.read_text().splitlines()) < 6:
    assert process.poll() is None
    time.sleep(0.02)
  process.terminate()  # saves and asks for a restart
  assert process.wait() == 42 and newest(base / 'stale_broken') >= 5
  run(broken)
  whole, broken = final_state(base / 'stale'), final_state(base / 'stale_broken')
  jax.tree.map(np.testing.assert_array_equal, whole[0], broken[0])
  rows = [json.loads(x) for x in (base / 'stale' / 'metrics.jsonl').read_text().splitlines()]
  assert [r['version_lag/max'] for r in rows if r['step']] == [0, 1] + [2] * (STEPS - 2)
  assert any(r.get('group/kind1_count', 0) for r in rows), 'no BCQ group: it proves nothing'


@pytest.mark.slow
@pytest.mark.parametrize('slots', [0, 8])
def test_two_processes_are_one_run(base, slots):
  """Two processes of two devices against one of four; a SIGTERM to one of them stops both."""
  alone, both = (base / f'{name}_{slots}' for name in ('alone', 'both'))
  mesh = ('--config.mesh.fsdp=2', '--config.mesh.data=2', '--config.ckpt.every_steps=100',
          f'--config.rollout.slots={slots}')
  run(zppo(base, alone.name, *mesh), devices=4)

  def start():
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    return [subprocess.Popen(
      [*zppo(base, both.name, *mesh), f'--coordinator_address=127.0.0.1:{port}',
       '--num_processes=2', f'--process_id={i}'], cwd=ROOT, env=environment(2),
      stdout=subprocess.DEVNULL,
      stderr=open(base / f'both_{i}.txt', 'w', encoding='utf-8')) for i in range(2)]

  pair, seen = start(), both / 'metrics.jsonl'
  while not seen.exists() or len(seen.read_text().splitlines()) < 4:
    assert all(p.poll() is None for p in pair), (base / 'both_0.txt').read_text()
    time.sleep(0.02)
  pair[1].terminate()
  assert [p.wait() for p in pair] == [42, 42] and 0 < newest(both) < STEPS
  assert [p.wait() for p in start()] == [0, 0]
  whole, found = final_state(alone), final_state(both)
  assert int(whole[0]['updates']) > 0 and (both / 'DONE').exists()
  assert whole[1]['stream'] == found[1]['stream']

  def close(a, b):  # processes add in another order than threads
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max(initial=0))

  jax.tree.map(close, whole[0], found[0])
  rows = [[json.loads(x) for x in (folder / 'metrics.jsonl').read_text().splitlines()]
          for folder in (alone, both)]
  assert len(rows[0]) == len(rows[1]) == STEPS + 1
  for a, b in zip(*rows):
    assert a.keys() == b.keys()
    for key in ('step', 'reward/mean', 'sampled_tokens', 'buffer/size', 'eval/accuracy'):
      assert a.get(key) == b.get(key), key
