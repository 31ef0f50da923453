"""Saving a run and coming back to it; what a SIGTERM asks for."""

from __future__ import annotations

import collections
import os
import signal as signals

import jax

from zppo_jax.core import types
from zppo_jax.core.errors import UserError
from zppo_jax.replay import prompts
from zppo_jax.train import checkpoint
from zppo_jax.train.run import Run, Sampled


class Saver:
  """Checkpoints of a run, and the way back from them."""

  def __init__(self, run: Run):
    self._run = run
    self._manager = checkpoint.make_manager(
      os.path.join(os.path.abspath(run.workdir), 'checkpoints'),
      every=run.settings.checkpoint_every, keep=run.settings.keep_checkpoints)

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def save(self, at: int, train_state, queue, force: bool = False) -> None:
    items = list(queue)
    meta = {'stream': self._run.stream.get_state(),
            'pending': [{'group_sizes': q.group_sizes, 'metrics': q.metrics, 'dump': q.dump}
                        for q in items]}
    checkpoint.save(self._manager, at, state=train_state, pending=[q.rollouts for q in items],
                    meta=meta, force=force and self._manager.latest_step() != at)

  def restore(self, at: int, abstract):
    train_state, pending, meta = checkpoint.restore(self._manager, at, state=abstract)
    check_buffers(train_state.method, len(self._run.setup.questions.source))
    self._run.stream.set_state(meta['stream'])
    queue = collections.deque(
      Sampled(tuple(types.Rollout(**r) for r in rollouts), tuple(m['group_sizes']), m['metrics'],
              m['dump']) for rollouts, m in zip(pending, meta['pending']))
    return train_state, queue

  def close(self) -> None:
    self._manager.wait_until_finished()
    self._manager.close()


def check_buffers(method_state, num_questions: int) -> None:
  """Raises UserError when a restored prompt buffer holds questions that the data has not."""
  is_buffer = lambda x: isinstance(x, prompts.PromptBuffer)
  for buffer in filter(is_buffer, jax.tree.leaves(method_state, is_leaf=is_buffer)):
    try:
      prompts.check_restored(buffer, num_questions)
    except ValueError as error:
      raise UserError(f'checkpoint: {error}; is data.path or data.size another one?') from error


class Preemption:
  """Notes a SIGTERM, so that the step in progress ends and is saved."""

  def __init__(self):
    self.asked = False
    self._old = None

  def __enter__(self):
    try:
      self._old = signals.signal(signals.SIGTERM, self._note)
    except ValueError:  # not the main thread
      self._old = None
    return self

  def _note(self, *_):
    self.asked = True

  def __exit__(self, *_):
    if self._old is not None:
      signals.signal(signals.SIGTERM, self._old)
