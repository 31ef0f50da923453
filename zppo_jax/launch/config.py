"""Checks that report every problem of a config at once, before any array is made."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from zppo_jax.core.errors import ConfigError

NOT_PART_OF_THE_RUN = ('log', 'ckpt', 'launch')


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is wrong with one dotted config field."""

  field: str
  message: str


def suggest(name: str, known: Iterable[str]) -> str:
  """`did you mean 'x'?` for the closest known name, else the list of them."""
  known = sorted(map(str, known))
  close = difflib.get_close_matches(str(name), known, n=1)
  return f'did you mean {close[0]!r}?' if close else f'choose from {", ".join(known)}'


def check_enum(field: str, value: Any, choices: Collection[Any]) -> list[Problem]:
  """`value` must be one of `choices`; the message has the closest one."""
  if value in choices:
    return []
  return [Problem(field, f'{value!r}: {suggest(value, choices)}')]


def check_range(
  field: str,
  value: Any,
  *,
  low: float = -math.inf,
  high: float = math.inf,
  open_low: bool = False,
  open_high: bool = False,
) -> list[Problem]:
  """`value` must be a number between the bounds, which belong to the range unless open."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return [Problem(field, f'must be a number, got {value!r}')]
  above = value > low or (value == low and not open_low)
  below = value < high or (value == high and not open_high)
  if above and below:
    return []
  if high == math.inf:
    wanted = f'{"above" if open_low else "at least"} {low}'
  elif low == -math.inf:
    wanted = f'{"below" if open_high else "at most"} {high}'
  else:
    wanted = f'in {"(" if open_low else "["}{low}, {high}{")" if open_high else "]"}'
  return [Problem(field, f'must be {wanted}, got {value}')]


def check_divisible(field: str, value: int, divisor: int, *, by: str) -> list[Problem]:
  """`value` must be a positive multiple of `divisor`, which `by` names; lists valid neighbours."""
  if divisor < 1:
    return [Problem(field, f'{by} = {divisor} must be positive')]
  if value > 0 and value % divisor == 0:
    return []
  below = max(value, 0) // divisor * divisor
  nearest = [str(n) for n in (below, below + divisor) if n > 0]
  return [
    Problem(
      field, f'{value} is not a multiple of {by} = {divisor}; nearest: {" or ".join(nearest)}'
    )
  ]


def check_paths_writable(workdir: str | os.PathLike) -> list[Problem]:
  """The folder, or the nearest existing one above it, must be a writable local folder."""
  text = os.fspath(workdir)
  if not text:
    return [Problem('workdir', 'is empty')]
  if '://' in text:
    return [Problem('workdir', f'{text!r}: must be a local or mounted path')]
  existing = os.path.abspath(text)
  while not os.path.lexists(existing):
    existing = os.path.dirname(existing)
  if not os.path.isdir(existing):
    return [Problem('workdir', f'{existing} is not a folder')]
  if not os.access(existing, os.W_OK | os.X_OK):
    return [Problem('workdir', f'no permission to write in {existing}')]
  return []


def unknown_keys(given: Iterable[str], known: Collection[str], prefix: str = '') -> list[Problem]:
  """One problem, with a suggestion, per given key that is not known; `prefix` leads to them."""
  lead = f'{prefix}.' if prefix else ''
  return [
    Problem(f'{lead}{key}', f'unknown field: {suggest(key, known)}')
    for key in given
    if key not in known
  ]


def raise_all(problems: Sequence[Problem]) -> None:
  """ConfigError that lists every problem; returns where there is none."""
  if not problems:
    return
  lines = [f'{problem.field}: {problem.message}' for problem in problems]
  if len(lines) == 1:
    raise ConfigError(lines[0])
  raise ConfigError('\n  '.join([f'{len(lines)} problems in the config:', *lines]))


def to_dict(config: Any) -> dict[str, Any]:
  """Plain nested dicts of a ConfigDict (references resolved) or a mapping; tuples become lists."""
  plain = config.to_dict() if hasattr(config, 'to_dict') else config
  return json.loads(json.dumps(plain))


def to_json(config: Any) -> str:
  """Canonical JSON: sorted keys, indented, newline at the end."""
  return json.dumps(to_dict(config), indent=2, sort_keys=True) + '\n'


def flatten(config: Any) -> dict[str, Any]:
  """{dotted name: value} of every leaf; empty sub-configs count as leaves."""

  def walk(node: Any, prefix: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(node, Mapping) or not node:
      yield prefix, node
      return
    for key in sorted(node):
      yield from walk(node[key], f'{prefix}.{key}' if prefix else key)

  plain = to_dict(config)
  return dict(walk(plain, '')) if plain else {}


def diff_configs(a: Any, b: Any) -> list[str]:
  """`name: old -> new` for every leaf that differs; a missing one is written `(none)`."""
  left, right = flatten(a), flatten(b)
  show = lambda leaves, name: repr(leaves[name]) if name in leaves else '(none)'
  return [
    f'{name}: {show(left, name)} -> {show(right, name)}'
    for name in sorted(set(left) | set(right))
    if show(left, name) != show(right, name)
  ]


def without(config: Any, exclude: Sequence[str]) -> dict[str, Any]:
  """The plain config without the top-level fields `exclude`."""
  return {key: value for key, value in to_dict(config).items() if key not in exclude}


def config_hash(config: Any, exclude: Sequence[str] = NOT_PART_OF_THE_RUN) -> str:
  """16 hex digits over the canonical JSON of all fields that shape the run's results."""
  return hashlib.sha256(to_json(without(config, exclude)).encode()).hexdigest()[:16]
