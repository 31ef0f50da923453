"""Commands and scripts as text: words in, quoted lines out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence


def line(words: Sequence[str]) -> str:
  """Quoted for a shell; of `--flag=value` only the value."""
  parts = (re.fullmatch(r'(--[a-z-]+=)?(.*)', word, re.DOTALL).groups('') for word in words)
  return ' '.join(head + shlex.quote(tail) for head, tail in parts)


def lines(*rows: Sequence[str]) -> str:
  """One command over several lines."""
  return ' \\\n  '.join(map(line, rows))


def optional(flag: str, value: str) -> tuple[str, ...]:
  """`--flag=value`, or nothing for an empty value."""
  return (f'--{flag}={value}',) if value else ()


def script(*parts: str) -> str:
  """A bash script that ends at the first command that fails."""
  return '\n\n'.join(['#!/usr/bin/env bash\nset -euo pipefail', *parts]) + '\n'
