"""GRPO after a warm start on worked solutions, in a folder that is thrown away."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any


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
