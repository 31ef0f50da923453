"""A report of one or more runs: PNG plots and one self-contained HTML page.

Reads `metrics.jsonl`, `timing.jsonl` and `rollouts/step_*.jsonl` (rows with prompt, response,
reward) of each workdir; a file that is missing leaves its part of the report empty.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from zppo_jax.core.errors import UserError
from zppo_jax.train import metrics, report_page

Series = tuple[list[int], list[float]]  # steps, values


@dataclasses.dataclass(frozen=True)
class Panel:
  """One small plot: its title, the unit of its y axis, the metric keys that may carry it."""

  title: str
  unit: str
  keys: tuple[str, ...]
  limits: tuple[float, float] | None = None


LEARNING = (
  Panel('Training reward', 'mean reward', ('reward/mean', 'reward'), (0.0, 1.0)),
  Panel('Held-out accuracy', 'fraction right', ('eval/accuracy', 'accuracy'), (0.0, 1.0)),
  Panel('Response length', 'tokens', ('response/len_mean',)),
  Panel('Policy entropy', 'nats per token', ('entropy', 'loss/entropy')),
  Panel('Sampler and trainer mismatch', 'k3 estimate, nats', ('mismatch/kl_k3', 'mismatch/kl')),
  Panel('Prompt buffer', 'questions', ('buffer/size',)),
)
SPEED = (
  Panel('Throughput', 'tokens per second', ('tokens_per_s',)),
  Panel('Step time', 'seconds', ('time/step', 'time/total')),
)


def read_series(workdir: str) -> dict[str, Series]:
  """Every metric of a run by key: (steps, finite values), the last row of a step winning."""
  points: dict[str, dict[int, float]] = {}
  for name in (metrics.METRICS, metrics.TIMING):
    for row in metrics.read_rows(os.path.join(workdir, name)):
      for key, value in row.items():
        if key != 'step' and math.isfinite(float(value)):
          points.setdefault(key, {})[row['step']] = float(value)
  return {
    key: (sorted(by_step), [by_step[step] for step in sorted(by_step)])
    for key, by_step in points.items()
  }


def read_rollouts(workdir: str, max_rows: int = 4) -> list[dict[str, Any]]:
  """Rows of the newest rollout file, each with its `step`; right and wrong ones if there are."""
  files = glob.glob(os.path.join(workdir, 'rollouts', 'step_*.jsonl'))
  numbered = sorted((int(n[0]), f) for f in files if (n := re.findall(r'step_(\d+)\.jsonl$', f)))
  if not numbered:
    return []
  step, path = numbered[-1]
  rows = []
  with open(path, encoding='utf-8', errors='replace') as file:
    for line in file:
      try:
        row = json.loads(line)
      except json.JSONDecodeError:  # torn last line
        continue
      if isinstance(row, dict):
        rows.append({'step': step, **row})
  right = [row for row in rows if float(row.get('reward') or 0) > 0]
  wrong = [row for row in rows if float(row.get('reward') or 0) <= 0]
  half = max(max_rows // 2, max_rows - len(wrong))
  chosen = right[:half]
  return chosen + wrong[: max_rows - len(chosen)]


def find(series: Mapping[str, Series], panel: Panel) -> Series | None:
  """The first of the panel's metrics that the run has."""
  return next((series[key] for key in panel.keys if key in series), None)


def smooth(values: Sequence[float], window: int) -> list[float]:
  """Centred running mean over about `window` values, over those that exist at the ends."""
  sums, half = [0.0, *itertools.accumulate(values)], window // 2
  ends = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
  return [(sums[high] - sums[low]) / (high - low) for low, high in ends]


def plot_panels(
  runs: Mapping[str, Mapping[str, Series]], panels: Sequence[Panel], path: str
) -> str | None:
  """Small multiples, one curve per run, to a PNG; None if no run has any of the panels.

  Long curves are drawn as a running mean over a faint line of the raw values.
  """
  drawn = [p for p in panels if any(find(series, p) for series in runs.values())]
  if not drawn:
    return None
  from matplotlib.figure import Figure  # without pyplot: Agg, and no global state

  columns = min(len(drawn), 3 if len(drawn) > 4 else 2)
  rows = -(-len(drawn) // columns)
  figure = Figure(figsize=(4.6 * columns, 3.1 * rows + 0.5), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis, panel in zip(axes, drawn, strict=False):
    _draw(axis, panel, runs)
  for axis in axes[len(drawn) :]:
    axis.remove()
  handles = [_legend_line(i) for i in range(len(runs))]
  figure.legend(handles, list(runs), loc='outside lower center', ncols=min(len(runs), 4))
  figure.savefig(path, dpi=110)
  return path


def _colour(index: int) -> str:
  return f'C{index % 10}'


def _legend_line(index: int):
  from matplotlib.lines import Line2D

  return Line2D([], [], color=_colour(index), linewidth=2)


def _draw(axis, panel: Panel, runs: Mapping[str, Mapping[str, Series]]) -> None:
  for index, series in enumerate(runs.values()):
    found = find(series, panel)
    if found is None:
      continue
    steps, values = found
    window = max(1, len(values) // 20)
    if window > 1:
      axis.plot(steps, values, color=_colour(index), alpha=0.25, linewidth=0.8)
    marker = 'o' if len(steps) < 25 else None
    mean = smooth(values, window)
    axis.plot(steps, mean, color=_colour(index), linewidth=2, marker=marker, markersize=3)
  axis.set(title=panel.title, xlabel='training step', ylabel=panel.unit)
  if panel.limits:
    axis.set_ylim(panel.limits[0] - 0.03, panel.limits[1] + 0.03)
  axis.grid(alpha=0.3)
  axis.spines[['top', 'right']].set_visible(False)


def summarise(series: Mapping[str, Series]) -> dict[str, Any]:
  """The first, best and last held-out accuracy, the last reward, and how long the run took."""
  reward, accuracy = (find(series, panel) for panel in LEARNING[:2])
  row: dict[str, Any] = {'steps': max((s[0][-1] for s in series.values()), default=0)}
  if accuracy:
    row |= {'accuracy, first': accuracy[1][0], 'accuracy, best': max(accuracy[1])}
    row['accuracy, last'] = accuracy[1][-1]
  if reward:
    tail = reward[1][-max(1, len(reward[1]) // 20) :]
    row['training reward, last 5 %'] = sum(tail) / len(tail)
  return row


def write_report(
  workdirs: Mapping[str, str],
  out_dir: str,
  *,
  title: str = 'Training report',
  table: Sequence[Mapping[str, Any]] | None = None,
  notes: str = '',
  num_rollouts: int = 4,
) -> list[str]:
  """Writes `learning.png`, `speed.png` and `report.html` to `out_dir`; returns the paths.

  `workdirs` maps a label to a run's folder; `table` is the summary, one dict per row (by default
  one row per run, from its metrics). Raises UserError if a folder has no metrics.
  """
  runs = {label: read_series(path) for label, path in workdirs.items()}
  empty = [f'{label} ({workdirs[label]})' for label, series in runs.items() if not series]
  if empty or not runs:
    raise UserError(f'no {metrics.METRICS} to report on: {", ".join(empty) or "no run given"}')
  os.makedirs(out_dir, exist_ok=True)
  plots = []
  for name, panels in (('learning.png', LEARNING), ('speed.png', SPEED)):
    path = plot_panels(runs, panels, os.path.join(out_dir, name))
    plots += [path] if path else []
  if table is None:
    table = [{'run': label, **summarise(series)} for label, series in runs.items()]
  samples = {label: read_rollouts(path, num_rollouts) for label, path in workdirs.items()}
  page = os.path.join(out_dir, 'report.html')
  with open(page, 'w', encoding='utf-8') as file:
    file.write(report_page.render_page(title, notes, table, plots, samples))
  return [*plots, page]
