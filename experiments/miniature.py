"""Runs a paper's miniature: python -m experiments.miniature --name=zppo [--num_seeds=8] [--out=DIR]

Prints its table, its pass bars and what it does not claim; with --out writes DIR/NAME.json and
DIR/NAME.png. Exit status 1 if a bar fails, 2 for wrong flags.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from experiments.miniatures import babyai, calculator, fg2_gdn, tls, zppo
from zppo_jax.core.errors import UserError
from zppo_jax.launch import flags as flags_lib

FAILED, USER_ERROR = 1, 2


@dataclasses.dataclass(frozen=True)
class Miniature:
  """The functions of a module in `experiments/miniatures`; all but `run` take its result."""

  title: str
  axes: tuple[str, str]  # labels of x and y in the plot
  run: Callable[..., Any]  # run(num_seeds=)
  table: Callable[[Any], Sequence[str]]
  bars: Callable[[Any], Sequence[Any]]  # records with name, passed, figure, threshold
  notes: Callable[[Any], Sequence[str]]  # figures that nothing is claimed about
  record: Callable[[Any], dict[str, Any]]  # JSON values
  panels: Callable[[Any], Mapping[str, Mapping[str, np.ndarray]]]  # title -> arm -> [seeds, steps]
  # title -> what the points stand for, of panels that are not over steps
  ticks: Callable[[Any], Mapping[str, Sequence[Any]]] = lambda _: {}


MINIATURES: Mapping[str, Miniature] = {
  'zppo': Miniature(
    title='ZPPO, M1: the log-linear student',
    axes=('rollout step', 'P(right answer), 512 held-out questions'),
    run=zppo.run, table=zppo.table, bars=zppo.bars, notes=zppo.notes, record=zppo.record,
    panels=zppo.panels),
  'fg2-gdn': Miniature(
    title='FG2-GDN against KDA and GDN at equal state',
    axes=('fiftieth of training', 'held-out batches'),
    run=fg2_gdn.run, table=fg2_gdn.table, bars=fg2_gdn.bars, notes=fg2_gdn.notes,
    record=fg2_gdn.record, panels=fg2_gdn.panels),
  'calculator': Miniature(
    title='GRPO over several turns: products with a calculator',
    axes=('evaluation', 'held-out accuracy, 256 questions'),
    run=calculator.run, table=calculator.table, bars=calculator.bars, notes=calculator.notes,
    record=calculator.record, panels=calculator.panels),
  'babyai': Miniature(
    title='GRPO over episodes of BabyAI: go to one of two things',
    axes=('evaluation', 'held-out reward, 256 levels'),
    run=babyai.run, table=babyai.table, bars=babyai.bars, notes=babyai.notes,
    record=babyai.record, panels=babyai.panels),
  'asynctls': Miniature(
    title='AsyncTLS against Quest and Double Sparsity at equal token budgets',
    axes=('decode step, or blocks looked into', 'attention mass read, or answers right'),
    run=tls.run, table=tls.table, bars=tls.bars, notes=tls.notes, record=tls.record,
    panels=tls.panels, ticks=tls.ticks),
}


def find(name: str) -> Miniature:
  """The miniature of that name. UserError lists the known ones."""
  if name not in MINIATURES:
    raise UserError(f'--name must be one of {", ".join(sorted(MINIATURES))}; got {name!r}')
  return MINIATURES[name]


def bar_line(bar) -> str:
  """'PASS  name: figure > threshold'."""
  verdict, sign = ('PASS', '>') if bar.passed else ('FAIL', 'is not above')
  return f'{verdict}  {bar.name}: {bar.figure:+.4f} {sign} {bar.threshold:.4f}'


def plot(panels: Mapping[str, Mapping[str, np.ndarray]], axes: tuple[str, str], title: str,
         path: str, ticks: Mapping[str, Sequence[Any]]) -> None:
  """Mean curve of each arm with a band of one standard error over seeds, to a PNG.

  `ticks` names the points of panels that are not steps.
  """
  from matplotlib.figure import Figure  # without pyplot: Agg, and no global state

  figure = Figure(figsize=(6.2 * len(panels), 4.8), layout='constrained')
  drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  for axis, (name, arms) in zip(drawn, panels.items()):
    for i, (arm, curves) in enumerate(arms.items()):
      mean, steps = curves.mean(axis=0), np.arange(curves.shape[1])
      error = curves.std(axis=0, ddof=1) / len(curves) ** 0.5
      axis.plot(steps, mean, label=arm, color=f'C{i}', linewidth=1.8)
      axis.fill_between(steps, mean - error, mean + error, color=f'C{i}', alpha=0.2, linewidth=0)
    axis.set(title=name, xlabel=axes[0])
    if name in ticks:
      axis.set_xticks(range(len(ticks[name])), ticks[name])
    axis.legend(fontsize='small', frameon=False)
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
  drawn[0].set_ylabel(axes[1])
  figure.suptitle(f'{title}\nmean and standard error over seeds')
  figure.savefig(path, dpi=110)


def write(folder: str, name: str, miniature: Miniature, result, bars, seconds: float) -> list[str]:
  """Writes NAME.json and NAME.png; returns their paths."""
  os.makedirs(folder, exist_ok=True)
  paths = [os.path.join(folder, f'{name}.{kind}') for kind in ('json', 'png')]
  values = dict(miniature.record(result), bars=[dict(
    name=b.name, passed=bool(b.passed), figure=float(b.figure), threshold=float(b.threshold))
    for b in bars], seconds=round(seconds, 1))
  with open(paths[0], 'w', encoding='utf-8') as file:
    json.dump(values, file, indent=1)
  plot(miniature.panels(result), miniature.axes, miniature.title, paths[1],
       miniature.ticks(result))
  return paths


def execute(name: str, num_seeds: int, folder: str | None) -> int:
  """Runs, prints and writes; 0, or FAILED if a bar fails. UserError for wrong arguments."""
  miniature = find(name)
  if num_seeds < 2:
    raise UserError(f'--num_seeds must be at least 2 for standard errors, got {num_seeds}')
  start = time.perf_counter()
  result = miniature.run(num_seeds=num_seeds)
  seconds = time.perf_counter() - start
  bars = miniature.bars(result)
  print(f'{miniature.title}; {num_seeds} seeds, {seconds:.0f} s', *miniature.table(result),
        '', 'Pass bars', *map(bar_line, bars),
        '', 'Not claimed, for information', *miniature.notes(result), sep='\n')
  if folder:
    print('', *write(folder, name, miniature, result, bars, seconds), sep='\n')
  return 0 if all(bar.passed for bar in bars) else FAILED


def main(argv: Sequence[str]) -> int:
  values = flags.FLAGS
  logging.set_verbosity(logging.WARNING)  # checkpoints are talkative
  try:
    if len(argv) > 1:
      raise UserError(f'unexpected argument {argv[1]!r}: flags start with --')
    return execute(values.name, values.num_seeds, values.out)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return USER_ERROR


if __name__ == '__main__':
  flags.DEFINE_string('name', None, f'Which miniature: {", ".join(sorted(MINIATURES))}.')
  flags.DEFINE_integer('num_seeds', 8, 'Paired seeds; the bars are stated for 5 or more.')
  flags.DEFINE_string('out', None, 'Folder for NAME.json and NAME.png.')
  flags.mark_flag_as_required('name')
  app.run(main, flags_parser=flags_lib.flags_parser)
