"""GRPO after a warm start on worked solutions, in a folder that is thrown away."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any


def base(method: str, *, seed: int, steps: int, every: int) -> Any:
  """The tiny config of 'sft' or 'grpo' (16 groups), silent, with 256 held-out questions."""
  from ml_collections_configs import grpo, sft

  c = {'sft': sft, 'grpo': grpo}[method].get_config('tiny')
  c.update(seed=seed, num_steps=steps)
  c.eval.update(num_questions=256, every_steps=every)
  c.log.update(progress=False, dump_every_steps=0)
  c.ckpt.every_steps = steps
  if method == 'grpo':
    c.method.num_new = 16
  return c


def curve(config: Callable[..., Any], *, warm_steps: int, steps: int, evaluations: int
          ) -> tuple[list[float], dict[str, Any]]:
  """(held-out accuracy before GRPO and at each evaluation, metrics of the last step).

  `config`(method, steps=, every=) is a config of 'sft' or 'grpo'.
  """
  from experiments.train import train
  from zppo_jax.train import metrics

  with tempfile.TemporaryDirectory() as root:
    warm, place = os.path.join(root, 'warm'), os.path.join(root, 'grpo')
    train(config('sft', steps=warm_steps, every=warm_steps), warm, report_paths=False)
    c = config('grpo', steps=steps, every=steps // evaluations)
    c.init.checkpoint = warm
    train(c, place, report_paths=False)
    rows = metrics.read_rows(os.path.join(place, 'metrics.jsonl'))
  return [r['eval/accuracy'] for r in rows if 'eval/accuracy' in r], rows[-1]
