"""Tools that need nothing: an exact calculator, sandboxed Python, and read-only SQL."""

from __future__ import annotations

import ast
import operator
import os
import pathlib
import sqlite3
import time
from decimal import Context, Decimal, InvalidOperation
from fractions import Fraction

from zppo_jax.agents import sandbox
from zppo_jax.agents.tools import Tool, ToolContext, ToolResult
from zppo_jax.core.types import ToolSpec
from zppo_jax.rewards import arithmetic

_MAX_CHARS = 1024  # of an expression
_CHARACTERS = frozenset('0123456789.eE_+-*/%() \t\r\n')
_MAX_BITS = 10_000  # of a numerator or denominator; also keeps within Python's limit for str(int)
_SIGNS = str.maketrans({'\u00d7': '*', '\u00f7': '/', '\u2212': '-'})
_MAX_SQL_CHARS = 1 << 16  # of an answer
_MAX_VALUE_BYTES = 1 << 18  # of one SQL value; some functions take the product of two lengths
_MAX_PATTERN_BYTES = 200  # of LIKE and GLOB, which no clock interrupts either


def _spec(name: str, description: str, argument: str, meaning: str) -> ToolSpec:
  """A tool with one text argument."""
  properties = {argument: {'type': 'string', 'description': meaning}}
  return ToolSpec(
    name,
    description,
    {
      'type': 'object',
      'properties': properties,
      'required': [argument],
      'additionalProperties': False,
    },
  )


def calculator() -> Tool:
  """Exact values of + - * / // % ** over decimal numbers."""

  def call(arguments: dict, ctx: ToolContext) -> ToolResult:
    del ctx
    try:
      return ToolResult(_shown(evaluate(arguments['expression'])))
    except ZeroDivisionError:
      return ToolResult('error: division by zero', ok=False)
    except ValueError as error:
      return ToolResult(f'error: {error}', ok=False)

  return Tool(
    _spec(
      'calculator',
      'Computes the exact value of an expression of numbers, brackets and + - * / // % **.',
      'expression',
      'e.g. (1/3 + 0.25) * 2**10',
    ),
    call,
  )


def evaluate(expression: str) -> Fraction:
  """Exact value. Errors: ValueError (not such an expression, too large), ZeroDivisionError."""
  if len(expression) > _MAX_CHARS:
    raise ValueError(f'the expression has more than {_MAX_CHARS} characters')
  source = expression.translate(_SIGNS).strip()
  if not set(source) <= _CHARACTERS:  # other words would make the parser warn
    raise ValueError('only numbers, brackets and + - * / // % ** are allowed')
  try:
    return _value(ast.parse(source, mode='eval').body, source)
  except (SyntaxError, RecursionError, MemoryError) as error:
    raise ValueError('not an expression of numbers and + - * / // % **') from error


def _value(node: ast.AST, source: str) -> Fraction:
  match node:
    case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
      return _number(node, source)
    case ast.UnaryOp(op=ast.USub(), operand=operand):
      return -_value(operand, source)
    case ast.UnaryOp(op=ast.UAdd(), operand=operand):
      return _value(operand, source)
    case ast.BinOp(left=left, op=op, right=right):
      return _bounded(_apply(op, _value(left, source), _value(right, source)))
  raise ValueError('only numbers, brackets and + - * / // % ** are allowed')


def _number(node: ast.Constant, source: str) -> Fraction:
  if isinstance(node.value, int):
    return _bounded(Fraction(node.value))
  # the digits as they are written: a float has lost some
  try:
    number = Decimal(ast.get_source_segment(source, node))
  except InvalidOperation:  # an exponent of twenty digits
    number = Decimal('inf')
  if not number.is_finite() or abs(number.adjusted()) > _MAX_CHARS:
    raise ValueError('a number is too large or too small')
  return _bounded(Fraction(number))


def _apply(op: ast.operator, left: Fraction, right: Fraction) -> Fraction:
  operators = arithmetic.OPERATORS | {
    ast.FloorDiv: lambda a, b: Fraction(a // b), ast.Mod: operator.mod, ast.Pow: _power}
  if type(op) not in operators:
    raise ValueError('only + - * / // % ** are allowed, a power is **')
  return operators[type(op)](left, right)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
  if exponent.denominator != 1:
    raise ValueError('an exponent must be an integer')
  if _bits(base) * abs(exponent) > 2 * _MAX_BITS:
    raise ValueError('a power is too large')
  return base ** int(exponent)


def _bits(value: Fraction) -> int:
  return max(value.numerator.bit_length(), value.denominator.bit_length())


def _bounded(value: Fraction) -> Fraction:
  if _bits(value) > _MAX_BITS:
    raise ValueError('a value is too large')
  return value


def _shown(value: Fraction) -> str:
  """`7`, `7/2 = 3.5` or `1/3 (about 0.333333333333333)`."""
  if value.denominator == 1:
    return str(value)
  about = Context(prec=15).divide(Decimal(value.numerator), Decimal(value.denominator))
  return f'{value} = {about}' if Fraction(about) == value else f'{value} (about {about})'


def python(limits: sandbox.Limits | None = None, run: sandbox.Sandbox = sandbox.run_python) -> Tool:
  """Runs a program in a sandbox; by default under limits with which all it says fits a message."""
  limits = limits or sandbox.Limits(output_bytes=8000)

  def call(arguments: dict, ctx: ToolContext) -> ToolResult:
    del ctx
    result = run(arguments['code'], limits=limits)
    ends = {
      'ok': '',
      'error': f'[exit status {result.returncode}]',
      'timeout': f'[stopped after {limits.wall_s:g} s, or {limits.cpu_s:g} s of CPU time]',
      'killed': f'[killed by signal {-result.returncode}]',
    }
    parts = [part.rstrip('\n') for part in (result.stdout, result.stderr, ends[result.status])]
    content = '\n'.join(part for part in parts if part)
    return ToolResult(content or '[no output]', ok=result.status == 'ok')

  return Tool(
    _spec(
      'python',
      'Runs a Python program with the standard library and returns what it prints.',
      'code',
      'the whole program; nothing is kept between calls',
    ),
    call,
  )


def sql(
  path: str | os.PathLike | None = None,
  *,
  script: str | None = None,
  max_rows: int = 100,
  wall_s: float = 5.0,
) -> Tool:
  """Queries a SQLite file, or the database that `script` sets up; nothing can be changed.

  Errors: ValueError unless exactly one is given; FileNotFoundError; sqlite3.Error for the script.
  """
  if (path is None) == (script is None):
    raise ValueError('give either path or script')
  if path is not None and not pathlib.Path(path).is_file():
    raise FileNotFoundError(f'path: there is no database {os.fspath(path)!r}')
  image = None if script is None else _image(script)

  def call(arguments: dict, ctx: ToolContext) -> ToolResult:
    del ctx
    connection = _open(path, image)  # of its own: a connection belongs to one thread
    try:
      return ToolResult(_query(connection, arguments['query'], max_rows, wall_s))
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
      late = str(error) == 'interrupted'
      return ToolResult(f'error: {f"stopped after {wall_s:g} s" if late else error}', ok=False)
    finally:
      connection.close()

  return Tool(
    _spec(
      'sql',
      f'Answers one SQL query (SQLite, read-only); at most {max_rows} rows. Tables are listed in'
      ' sqlite_master.',
      'query',
      'one SELECT statement',
    ),
    call,
  )


def _image(script: str) -> bytes:
  connection = sqlite3.connect(':memory:')
  try:
    connection.executescript(script)
    connection.commit()
    return connection.serialize()
  finally:
    connection.close()


def _open(path: str | os.PathLike | None, image: bytes | None) -> sqlite3.Connection:
  if path is not None:
    return sqlite3.connect(pathlib.Path(path).resolve().as_uri() + '?mode=ro', uri=True)
  connection = sqlite3.connect(':memory:')
  connection.deserialize(image)
  return connection


_REFUSED = {sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA}
_INNER_PRAGMAS = {'data_version', 'page_size'}  # full-text tables ask for these themselves


def _authorize(action: int, name: str | None, *_) -> int:
  """Refuses what leads out of the database, or makes it writable again."""
  inner = action == sqlite3.SQLITE_PRAGMA and name in _INNER_PRAGMAS
  return sqlite3.SQLITE_DENY if action in _REFUSED and not inner else sqlite3.SQLITE_OK


def _query(connection: sqlite3.Connection, query: str, max_rows: int, wall_s: float) -> str:
  """A line of column names, then one line per row; raises sqlite3.Error, also when it is late."""
  end = time.monotonic() + wall_s
  connection.text_factory = lambda data: data.decode('utf-8', 'replace')
  connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
  connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, _MAX_PATTERN_BYTES)
  connection.set_progress_handler(lambda: time.monotonic() > end, 100)
  connection.execute('PRAGMA query_only = ON')
  connection.set_authorizer(_authorize)
  cursor = connection.execute(query)
  lines = [' | '.join(column[0] for column in cursor.description or ())]
  size = 0
  for number, row in enumerate(cursor):
    if number >= max_rows or size > _MAX_SQL_CHARS:
      lines.append(f'[more rows than these {number}]')
      break
    lines.append(' | '.join(map(_cell, row)))
    size += len(lines[-1])
  return '\n'.join(lines) or '[no result]'


def _cell(value) -> str:
  if value is None:
    return 'NULL'
  return f"x'{value.hex()}'" if isinstance(value, bytes) else str(value)


TOOLS = {'calculator': calculator, 'python': python}  # those that need no argument
