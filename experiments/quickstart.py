"""The main job: warm starts, then ZPPO beside GRPO+buffer.

python -m experiments.quickstart --config=ml_collections_configs/quickstart.py --workdir=DIR

Warm-starts a student and a better teacher, then trains the student by ZPPO and by GRPO with the
same prompt buffer at equal student rollouts, and prints what came of it. Every stage resumes.
"""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

from experiments.train import train
from zppo_jax.launch import app
from zppo_jax.train import metrics as metrics_lib

SHARED = ('data', 'rollout', 'eval', 'log', 'launch', 'mesh', 'agent')
LABELS = {'zppo': 'ZPPO', 'grpo': 'GRPO+buffer'}


def stage(config: Any, name: str, **checkpoints: str) -> Any:
  """Config of one stage: its own section under the shared ones, with the roles it starts from."""
  found = copy.deepcopy(config[name])
  with found.unlocked():
    found.seed = config.seed
    for section in SHARED:
      every = found[section].get('every_steps') if section in ('eval', 'log') else None
      found[section] = copy.deepcopy(config[section])
      if every is not None:
        found[section].every_steps = every
    for role, folder in checkpoints.items():
      found[role].checkpoint = folder
  found.lock()
  return found


def fit_buckets(config: Any) -> None:
  """Widens the token buckets to the user's own file: every prompt and solution must fit."""
  from zppo_jax.launch import build
  from zppo_jax.methods import reformulate
  from zppo_jax.train.setup import Questions

  with config.unlocked():
    config.tokenizer, config.init = config.student.tokenizer, config.student.init
  source = build.build_source(config, 'train')
  questions = Questions(source, build.build_tokenizer(config, source), build.build_template(config),
                        config.data.instruction)
  prompt, _, response, _ = build.longest(questions)
  up = lambda tokens: -(-tokens // 8) * 8
  method, rollout = config.zppo.method, config.rollout
  rollout.prompt_tokens = max(rollout.prompt_tokens, up(prompt))
  rollout.max_new_tokens = max(rollout.max_new_tokens, up(response))
  rollout.reformulated_tokens = max(rollout.reformulated_tokens, reformulate.prompt_bound(
    rollout.prompt_tokens, method.group_size or 8, method.compress_tokens, method.wording))


def rows_of(folder: str) -> list[dict[str, Any]]:
  return metrics_lib.read_rows(os.path.join(folder, 'metrics.jsonl'))


def total(rows: list[dict[str, Any]], name: str) -> float:
  return sum(r.get(name, 0.0) for r in rows)


def accuracies(rows: list[dict[str, Any]]) -> list[float]:
  return [r['eval/accuracy'] for r in rows if 'eval/accuracy' in r]


def graduation(row: dict[str, Any], size: int) -> dict[str, str]:
  """'graduated/admitted' by the accuracy that a question had when it entered the buffer."""
  found = {}
  for k in range(size // 2):
    done, entered = row[f'buffer/graduated_at_{k}'], row[f'buffer/admitted_at_{k}']
    found[f'graduated from {k}/{size}'] = f'{done:.0f}/{entered:.0f}'
  return found


def summary(folders: dict[str, str], size: int) -> list[dict[str, Any]]:
  """One row per method: held-out accuracy, graduations, rollouts, seconds."""
  table = []
  for name, label in LABELS.items():
    rows = rows_of(folders[name])
    seconds = total(metrics_lib.read_rows(os.path.join(folders[name], 'timing.jsonl')), 'time/step')
    held = accuracies(rows)
    table.append({
      'method': label, 'held-out accuracy before': f'{held[0]:.3f}',
      'after': f'{held[-1]:.3f}', **graduation(rows[-1], size),
      'student rollouts': f'{total(rows, "rollouts"):.0f}',
      'sampled tokens': f'{total(rows, "sampled_tokens"):.0f}',
      'training seconds': f'{seconds:.0f}'})
  return table


def print_table(table: list[dict[str, Any]]) -> None:
  """The table on its side: one line per quantity, one column per method."""
  for key in table[0]:
    print(f'  {key:28s}' + ''.join(f'{row[key]:>14s}' for row in table))


def matched_steps(config: Any, folder: str) -> int:
  """Steps of the baseline that spend the student rollouts that ZPPO spent."""
  method = config.grpo.method
  replayed = int(0.25 * method.num_new if method.rho_replay is None
                 else method.rho_replay * method.num_new)
  per_step = (method.num_new + replayed) * (method.group_size or 8)
  return round(total(rows_of(folder), 'rollouts') / per_step)


def main(launch: app.Launch) -> None:
  from zppo_jax.train import report

  config, root = launch.config, launch.workdir
  folders = {name: os.path.join(root, name) for name in ('student', 'teacher', 'zppo', 'grpo')}
  if config.data.path:
    fit_buckets(config)

  def run(name: str, **checkpoints: str) -> None:
    print(f'== {name}', flush=True)
    train(stage(config, name, **checkpoints), folders[name], resume=launch.resume,
          cleanup=launch.cleanup, report_paths=False)

  run('student')
  run('teacher')
  run('zppo', init=folders['student'], teacher=folders['teacher'])
  with config.unlocked():
    config.grpo.num_steps = matched_steps(config, folders['zppo'])
  run('grpo', init=folders['student'])
  table = summary(folders, config.zppo.method.group_size or 8)
  reach = {name: accuracies(rows_of(folders[name]))[-1] for name in ('student', 'teacher')}
  print(f'\nheld-out accuracy of the warm start {reach["student"]:.3f}, '
        f'of the teacher {reach["teacher"]:.3f}')
  print_table(table)
  paths = report.write_report(
    {LABELS[n]: folders[n] for n in LABELS}, root, table=table,
    title='ZPPO beside GRPO+buffer at equal student rollouts',
    notes=f'Held-out accuracy: warm start {reach["student"]:.3f}, teacher {reach["teacher"]:.3f}.')
  print('\n'.join(paths))


if __name__ == '__main__':
  sys.exit(app.run(main))
