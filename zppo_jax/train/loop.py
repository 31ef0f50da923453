"""The loop: plan, sample, explore, score, credit, step, absorb; metrics and checkpoints around it.

With max_staleness = s, the rollouts of step t were sampled with the weights of step t - s. The
update is dispatched first and sampling goes on meanwhile, so on disjoint meshes the two overlap;
the order of all state changes is the same, and s = 0 is the plain synchronous loop.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from zppo_jax.core import rng
from zppo_jax.core.errors import UserError
from zppo_jax.mesh import hosts
from zppo_jax.ops import groups
from zppo_jax.train import compiles, evaluate, memory, observe, state
from zppo_jax.train.context import StepContext
from zppo_jax.train.metrics import MetricWriter, PhaseTimer
from zppo_jax.train.progress import Progress
from zppo_jax.train.run import Programs, Run, Sampled, compile_programs, initial_state
from zppo_jax.train.saver import Preemption, Saver
from zppo_jax.train.watchdog import Watchdog

DEVICE_PHASES = ('time/rollout_policy', 'time/rollout_teacher', 'time/prepare', 'time/update',
                 'time/plan')


def sample(run: Run, params, method_state, at: int, version, timer) -> tuple[Any, Sampled]:
  """Phases one and two of a step: (method state, sampled batch)."""
  batch = next(run.stream)
  ctx = StepContext(run.setup, params, step=at, version=int(version), stream=run.stream,
                    timer=timer)
  with timer('plan'):
    method_state, planned = run.method.plan(method_state, batch, ctx)
  drawn = ctx.draw(planned, capacity=run.method.capacity, group_size=run.method.group_size)
  method_state, parts = run.method.explore(method_state, drawn, ctx)
  _check_groups(parts)
  found = ctx.metrics() | observe.rollout_metrics(parts)
  dump = []
  if run.settings.dump_every and at % run.settings.dump_every == 0:
    dump = observe.readable(parts, ctx, run.settings.dump_rows)
  return method_state, Sampled(tuple(p.rollout for p in parts),
                               tuple(p.group_size for p in parts), found, dump)


def _check_groups(parts) -> None:
  """Raises ValueError on a group that is not whole, before credit compares its rows."""
  total = sum(p.rollout.valid.shape[0] for p in parts)
  for part in parts:
    ids, valid = hosts.fetch((part.rollout.group_id, part.rollout.valid))
    groups.check_group_ids(ids[valid], total, part.group_size)


def _evaluate(run: Run, params) -> dict[str, float]:
  if run.eval_setup is None:
    return {}
  return evaluate.evaluate(run.eval_setup, params, run.eval_settings)


def _fetch(run: Run, rows: list[tuple[int, dict, dict]], writer: MetricWriter) -> None:
  """Writes the rows gathered since the last call; one transfer for all of them."""
  device, failed = jax.device_get([r[1] for r in rows]), None
  for (at, _, host), found in zip(rows, device):
    found = {k: float(v) for k, v in found.items()}
    bad = found.pop('nonfinite_max', 0.0)
    writer.write_scalars(at, host | found)
    if bad and failed is None:
      names = [k for k, v in found.items() if not math.isfinite(v)] or ['none']
      failed = UserError(f'non-finite gradient at step {at} (metrics not finite: '
                         f'{", ".join(names)}): it changed no parameter, and the state is kept in '
                         f'{run.workdir}/checkpoints')
  rows.clear()
  if failed is not None:
    raise failed


def train(run: Run) -> state.TrainState:
  """Runs to settings.num_steps, from the newest checkpoint in the workdir if there is one.

  Raises UserError on a non-finite gradient, after saving the state before it, and on a phase that
  hangs; SystemExit(42) after a SIGTERM, with the state saved.
  """
  compiles.install()
  programs, saver, watch = compile_programs(run), Saver(run), Watchdog(run.settings.phase_limit_s)
  timer = PhaseTimer(watch=watch)
  begin = saver.latest()
  queue: collections.deque[Sampled] = collections.deque()
  if begin is None:
    train_state = initial_state(run, programs)
  else:
    train_state, queue = saver.restore(begin, programs.abstract)
  with (MetricWriter(run.workdir, after_step=-1 if begin is None else begin,
                     tensorboard=run.settings.tensorboard, enabled=hosts.is_first()) as writer,
        Progress(run.settings.num_steps, start_step=begin or 0, every=run.settings.log_every,
                 enabled=run.progress and hosts.is_first()) as progress,
        Preemption() as preemption, watch, jax.set_mesh(run.setup.mesh)):
    if begin is None:
      with timer('evaluate'):
        writer.write_scalars(0, _evaluate(run, programs.policy(train_state.params)))
      with timer('checkpoint'):
        saver.save(0, train_state, queue, force=True)
      timer.take()  # none of it is part of a step
    body = _Body(run, programs, saver, timer, writer, progress)
    try:
      train_state = body.steps(train_state, queue, begin or 0, preemption)
    finally:
      body.profile(False)
      saver.close()
  return train_state


@dataclasses.dataclass
class _Body:
  """The steps themselves, with the tools they write to."""

  run: Run
  programs: Programs
  saver: Saver
  timer: PhaseTimer
  writer: MetricWriter
  progress: Progress
  memory: memory.Memory | None = None  # of the train step, once it is compiled
  tracing: bool = False

  def steps(self, train_state, queue, begin: int, preemption: Preemption):
    run, last = self.run, self.run.settings.num_steps
    rows: list = []
    while len(queue) < run.settings.max_staleness and begin + len(queue) < last:
      train_state, item = self._sample(train_state, self.programs.policy(train_state.params),
                                       begin + len(queue), int(train_state.version))
      queue.append(item)
    for at in range(begin, last):
      begin_at = run.settings.profile_start
      self.profile(0 <= begin_at <= at < begin_at + run.settings.profile_steps)
      train_state, metrics, host = self._one(train_state, queue, at)
      done = at + 1
      every = run.settings.eval_every
      if done == last or (every and done % every == 0):
        with self.timer('evaluate'):
          host |= _evaluate(run, self.programs.policy(train_state.params))
        self.timer.take()  # evaluation is not part of any step
      rows.append((done, metrics, host))
      asked = hosts.agree(preemption.asked)  # a signal may reach one process only
      stop = done == last or asked
      saves = stop or done % run.settings.checkpoint_every == 0
      if saves or done % run.settings.log_every == 0:
        try:
          _fetch(run, rows, self.writer)
        except UserError:
          with self.timer('checkpoint'):
            self.saver.save(done, train_state, queue, force=True)
          raise
        self.progress.update(done, self._shown(host, metrics))
      if saves:
        with self.timer('checkpoint'):  # counted in the next step
          self.saver.save(done, train_state, queue, force=stop)
      if asked and done < last:
        self.saver.close()
        raise SystemExit(42)
    return train_state

  def _shown(self, host, metrics):
    device = {k: float(metrics[k]) for k in ('loss/policy', 'loss/nll') if k in metrics}
    return {'loss': device.get('loss/nll', device.get('loss/policy', 0.0))} | host

  def _sample(self, train_state, params, at: int, version: int):
    method_state, item = sample(self.run, params, train_state.method, at, version, self.timer)
    return dataclasses.replace(train_state, method=method_state), item

  def _update(self, train_state, item: Sampled, at: int):
    """Credit and train step: (train state, device metrics)."""
    key = rng.fold(jax.random.key(self.run.setup.seed), at, 'minibatches')
    with self.timer('prepare'):
      method_state, parts = self.programs.prepare(
        train_state.params, train_state.method, item.rollouts, key, self.programs.roles,
        item.group_sizes)
      jax.block_until_ready(parts)
    train_state = dataclasses.replace(train_state, method=method_state)
    with self.timer('update'):
      if self.memory is None:
        self._compile_update(train_state, parts)
      train_state, metrics = self.programs.update(train_state, parts, self.programs.roles)
      if not self.run.settings.max_staleness:
        jax.block_until_ready(metrics)
    return train_state, metrics

  def _compile_update(self, train_state, parts) -> None:
    """Compiles the step for these shapes, and says what it needs before it runs."""
    compiled = self.programs.update.lower(train_state, parts, self.programs.roles).compile()
    self.programs = dataclasses.replace(self.programs, update=compiled)
    self.memory = memory.memory_report(compiled, dict(
      params=train_state.params, optimiser=train_state.opt_state, rollouts=parts,
      **self.programs.roles))
    if hosts.is_first():
      with open(os.path.join(self.run.workdir, 'memory.json'), 'w', encoding='utf-8') as file:
        json.dump(dataclasses.asdict(self.memory), file, indent=2)
      if self.run.progress:
        print(f'train step: {self.memory.line(memory.device_limit())}', file=sys.stderr)

  def _one(self, train_state, queue, at: int):
    """One rollout step: (train state, device metrics, host metrics)."""
    run, stale = self.run, self.run.settings.max_staleness
    start, version = time.perf_counter(), int(train_state.version)
    if not stale:
      train_state, item = self._sample(train_state, self.programs.policy(train_state.params), at,
                                       version)
      queue.append(item)
    item = queue.popleft()
    lag = observe.version_lag(item.rollouts, version)
    sampler = None  # a copy of the weights before the update, which is donated
    if stale:
      sampler = jax.tree.map(jnp.copy, self.programs.policy(train_state.params))
    rate = self.programs.learning_rate(train_state.updates)  # of the step's first update
    train_state, metrics = self._update(train_state, item, at)
    if stale and at + stale < run.settings.num_steps:
      train_state, ahead = self._sample(train_state, sampler, at + stale, version)
      queue.append(ahead)
    train_state = dataclasses.replace(
      train_state, method=self.programs.absorb(train_state.method, item.rollouts))
    metrics = metrics | self.programs.summary(train_state.method)
    metrics['learning_rate'] = rate
    self._dump(item, at)
    return train_state, metrics, item.metrics | lag | self._timing(start, item)

  def _timing(self, start: float, item: Sampled) -> dict[str, float]:
    total = time.perf_counter() - start
    found = self.timer.take()
    device = sum(found.get(k, 0.0) for k in DEVICE_PHASES)
    return found | {
      'time/step': total, 'time/host_frac': max(0.0, 1 - device / total),
      'tokens_per_s': item.metrics['sampled_tokens'] / total, 'compile_count': compiles.count(),
      'memory_peak_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

  def _dump(self, item: Sampled, at: int) -> None:
    if item.dump and hosts.is_first():
      folder = os.path.join(self.run.workdir, 'rollouts')
      os.makedirs(folder, exist_ok=True)
      with open(os.path.join(folder, f'step_{at}.jsonl'), 'w', encoding='utf-8') as file:
        file.writelines(json.dumps(row) + '\n' for row in item.dump)

  def profile(self, wanted: bool) -> None:
    """Starts or stops the profiler where it does not yet do what is wanted."""
    if wanted == self.tracing:
      return
    self.tracing = wanted
    if wanted:
      jax.profiler.start_trace(os.path.join(self.run.workdir, 'profile'))
    else:
      jax.profiler.stop_trace()
