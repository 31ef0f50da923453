"""The HTML of a report: one page without any outside file."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
h1, h2, h3 { line-height: 1.2 }
img { max-width: 100%; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
th { border-bottom: 2px solid #888 }
.sample { border-left: 4px solid #c62828; padding: .2rem 1rem; margin: 1rem 0; background: #f7f7f7 }
.sample.right { border-color: #2e7d32 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 }
"""


def format_cell(value: Any) -> str:
  """Numbers with four significant digits, None as a dash, everything else as text."""
  if value is None:
    return '\u2013'
  if isinstance(value, float):
    return f'{value:.4g}'
  return str(value)


def render_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A table of dicts; columns in the order of their first appearance, gaps left empty."""
  if not rows:
    return ''
  columns = list(dict.fromkeys(key for row in rows for key in row))
  head = ''.join(f'<th>{html.escape(str(c))}</th>' for c in columns)
  body = ''.join(
    '<tr>'
    + ''.join(f'<td>{html.escape(format_cell(row[c])) if c in row else ""}</td>' for c in columns)
    + '</tr>\n'
    for row in rows
  )
  return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'


def render_image(path: str) -> str:
  """A PNG inside the page."""
  with open(path, 'rb') as file:
    data = base64.b64encode(file.read()).decode()
  name = os.path.splitext(os.path.basename(path))[0]
  return f'<img alt="{html.escape(name)} curves" src="data:image/png;base64,{data}">'


def render_sample(row: Mapping[str, Any]) -> str:
  """One rollout: prompt, response, reward."""
  reward = float(row.get('reward') or 0.0)
  return (
    f'<div class="sample{" right" if reward > 0 else ""}">'
    f'<b>Prompt</b><pre>{html.escape(str(row.get("prompt", "")))}</pre>'
    f'<b>Response</b><pre>{html.escape(str(row.get("response", "")))}</pre>'
    f'<b>Reward</b> {reward:g} <small>(step {row["step"]})</small></div>'
  )


def render_page(
  title: str,
  notes: str,
  table: Sequence[Mapping[str, Any]],
  plots: Sequence[str],
  samples: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
  """The whole page; every given text is escaped."""
  parts = [f'<h1>{html.escape(title)}</h1>']
  parts += [f'<p>{html.escape(paragraph)}</p>' for paragraph in notes.split('\n\n') if paragraph]
  parts += ['<h2>Summary</h2>', render_table(table), '<h2>Curves</h2>']
  parts += [render_image(path) for path in plots]
  parts.append(
    '<p><small>Long curves: running mean over 5 % of the run, raw values faint.</small></p>'
  )
  if any(samples.values()):
    parts.append('<h2>Sample rollouts</h2>')
  for label, rows in samples.items():
    if rows:
      parts += [f'<h3>{html.escape(label)}</h3>', *map(render_sample, rows)]
  body = '\n'.join(parts)
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n'
    f'<body>\n{body}\n</body></html>\n'
  )
