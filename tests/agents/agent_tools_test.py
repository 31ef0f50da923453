"""What goes wrong in a tool is a message to the model; the built-in tools stay within bounds."""

import sqlite3
import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo_jax.agents import builtin_tools, tools
from zppo_jax.agents.tools import Tool, ToolContext, ToolLimits, ToolResult, run_calls, validate
from zppo_jax.core.types import Message, ToolCall, ToolSpec

CTX = ToolContext('task-1', turn=2, seed=3)
SCHEMA = {'type': 'object', 'properties': {'x': {'type': 'integer'}}, 'required': ['x'],
          'additionalProperties': False}


def tool(function, name='t', schema=SCHEMA):
  return Tool(ToolSpec(name, 'a test', schema), function)


def answer(function, *, limits=None, **arguments):
  """(content, answers) of one call of a tool that does `function`."""
  limits = limits or ToolLimits(call_s=5)
  answers = run_calls([ToolCall('c', 't', arguments or {'x': 1})], tools.toolbox(tool(function)),
                      CTX, limits=limits)
  assert len(answers.messages) == 1
  return answers.messages[0].content, answers


def test_a_call_is_answered():
  seen = []

  def add(arguments, ctx):
    seen.append((dict(arguments), ctx))
    arguments.clear()  # its own copy
    return ToolResult('two', cost={'units': 2.0})

  calls = [ToolCall('a', 't', {'x': 1}), ToolCall('b', 't', {'x': 2})]
  answers = run_calls(calls, tools.toolbox(tool(add)), CTX)
  assert answers == tools.Answers(
    (Message('tool', 'two', (), 'a', 't'), Message('tool', 'two', (), 'b', 't')), 0, 0,
    {'units': 4.0})
  assert seen == [({'x': 1}, CTX), ({'x': 2}, CTX)]
  assert calls[0].arguments == {'x': 1}


def test_a_result_that_is_not_ok_is_no_error():
  content, answers = answer(lambda a, c: ToolResult('no such file', ok=False))
  assert (content, answers.num_errors, answers.num_failed) == ('no such file', 0, 1)


def test_unknown_tool():
  answers = run_calls([ToolCall('c', 'nope', {})], tools.toolbox(tool(None, 'a'), tool(None, 'b')),
                      CTX)
  message = answers.messages[0]
  assert message.content == "error: there is no tool 'nope'; the tools are a, b"
  assert (message.role, message.tool_call_id, message.name) == ('tool', 'c', 'nope')
  assert answers.num_errors == 1


def test_arguments_against_the_schema_never_reach_the_tool():
  content, answers = answer(lambda a, c: pytest.fail('called'), x='one')
  assert content.startswith("error: wrong arguments for 't': arguments.x: ")
  assert answers.num_errors == 1


def fail(arguments, ctx):
  raise KeyError('colour')


@pytest.mark.parametrize(('function', 'said'), [
  (fail, "KeyError: 'colour'"), (lambda a, c: sys.exit(3), 'SystemExit: 3'),
  (lambda a, c: 'text', 'returned str, not a ToolResult'),
  (lambda a, c: ToolResult(42), 'without a text'),
  (lambda a, c: ToolResult('x', cost=None), 'cost that is no number'),
  (lambda a, c: ToolResult('x', cost={'units': '2'}), 'cost that is no number')])
def test_a_tool_that_breaks_is_told_to_the_model(function, said):
  content, answers = answer(function)
  assert content.startswith("error: 't' ") and said in content
  assert answers.num_errors == 1


def test_a_hanging_tool_does_not_block_the_next_call():
  release = threading.Event()
  box = tools.toolbox(tool(lambda a, c: release.wait(30), 'hang'),
                      tool(lambda a, c: ToolResult('here'), 'quick'))
  start = time.monotonic()
  answers = run_calls([ToolCall('1', 'hang', {'x': 1}), ToolCall('2', 'quick', {'x': 1})], box, CTX,
                      limits=ToolLimits(call_s=0.2))
  release.set()
  assert time.monotonic() - start < 5
  assert [m.content for m in answers.messages] == [
    "error: 'hang' gave no answer within 0.2 s", 'here']
  assert answers.num_errors == 1


def test_a_hanging_tool_does_not_keep_the_process_alive():
  code = """if True:
    import threading
    from zppo_jax.agents import tools
    from zppo_jax.core.types import ToolCall, ToolSpec
    t = tools.Tool(ToolSpec('t', '', {}), lambda a, c: threading.Event().wait())
    print(tools.run_calls([ToolCall('c', 't', {})], {'t': t}, tools.ToolContext('u'),
                          limits=tools.ToolLimits(call_s=0.1)).num_errors)"""
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert (out.stdout, out.returncode) == ('1\n', 0), out.stderr


@pytest.mark.parametrize('size', [100, 101, 102, 103])
def test_output_is_cut_between_characters(size):
  content, _ = answer(lambda a, c: ToolResult('€' * 1000), limits=ToolLimits(max_tool_bytes=size))
  assert content.endswith(f'\n[cut at {size} bytes]') and size - 3 < len(content.encode()) <= size
  assert set(content.split('\n')[0]) == {'€'}


def test_output_within_the_bound_is_whole():
  content, _ = answer(lambda a, c: ToolResult('€' * 21), limits=ToolLimits(max_tool_bytes=64))
  assert content == '€' * 21
  content, _ = answer(lambda a, c: ToolResult('a\ud800b'))
  assert content == 'a?b'


def test_toolbox_refuses_two_tools_of_one_name():
  with pytest.raises(ValueError, match="'t'"):
    tools.toolbox(tool(fail), tool(fail))


@pytest.mark.parametrize('wrong', [{'call_s': 0}, {'call_s': float('inf')}, {'max_tool_bytes': 63}])
def test_limits_are_checked(wrong):
  with pytest.raises(ValueError, match=next(iter(wrong))):
    ToolLimits(**wrong)


OBJECT = {'type': 'object', 'properties': {
  'n': {'type': 'integer'}, 'f': {'type': 'number'}, 'b': {'type': 'boolean'},
  's': {'type': ['string', 'null']}, 'e': {'enum': [1, 'a', None]},
  'l': {'type': 'array', 'items': {'type': 'object', 'required': ['k']}}},
  'additionalProperties': {'type': 'string'}}
GOOD = [{}, {'n': 3}, {'n': 3.0}, {'f': 1}, {'f': 1.5}, {'b': False}, {'s': None}, {'s': ''},
        {'e': 'a'}, {'e': 1}, {'e': None}, {'l': []}, {'l': [{'k': 1, 'j': 2}]}, {'other': 'x'}]
BAD = [({'n': True}, 'n'), ({'n': 1.5}, 'n'), ({'n': '3'}, 'n'), ({'f': False}, 'f'),
       ({'b': 0}, 'b'), ({'s': 3}, 's'), ({'e': 2}, 'e'), ({'e': True}, 'e'), ({'l': {}}, 'l'),
       ({'l': [{'k': 1}, {}]}, r'l\[1\]'), ({'l': [3]}, r'l\[0\]'), ({'other': 3}, 'other')]


@pytest.fixture(params=['own', 'jsonschema'])
def checker(request, monkeypatch):
  if request.param == 'own':
    monkeypatch.setattr(tools, '_jsonschema', lambda: None)
  else:
    pytest.importorskip('jsonschema')


@pytest.mark.usefixtures('checker')
def test_schema_verdicts():
  for good in GOOD:
    assert validate(good, OBJECT) == [], good
  for bad, path in BAD:
    errors = validate(bad, OBJECT)
    assert len(errors) == 1 and errors[0].startswith(f'arguments.{path}'.replace('\\', '')), bad
  assert len(validate({'y': 1}, SCHEMA)) == 2  # one missing, one unknown
  assert len(validate([], SCHEMA)) == 1
  assert validate({'anything': object()}, {}) == []


def calculate(expression):
  return builtin_tools.calculator().call({'expression': expression}, CTX)


@pytest.mark.parametrize(('expression', 'shown'), [
  ('1/3 + 0.25', '7/12 (about 0.583333333333333)'), ('0.1 + 0.2', '3/10 = 0.3'),
  ('-2**2 * (3 - 1)', '-8'), ('2**-2', '1/4 = 0.25'), ('7 // 2 + 7 % 3', '4'), ('3×4−6÷2', '9'),
  ('2**200', str(2**200)), ('1e3', '1000'), ('0.12345678901234567890123', None)])
def test_calculator_is_exact(expression, shown):
  result = calculate(expression)
  assert result.ok and (shown is None or result.content == shown)
  if shown is None:
    assert builtin_tools.evaluate(expression) == Fraction(expression)


@pytest.mark.parametrize('expression', [
  '', '1/0', '0**-1', '9**9**9', '2**20001', '1e9999999', '1e99999999999999999999', '2**0.5',
  '3**-20000000', '1e-99999999',
  '+'.join(['1'] * 600), '(' * 500, '-' * 1000 + '1', 'True', '2j', '"a"*9', 'x', '2^3', '(1, 2)',
  '__import__("os")', '[1][0]', '1 < 2', '1\0', '\ud800', '(2**9999)**1 * 2**9999'])
def test_calculator_refuses(expression):
  start = time.monotonic()
  result = calculate(expression)
  assert not result.ok and result.content.startswith('error: ')
  assert time.monotonic() - start < 1


@settings(max_examples=100, deadline=None)
@given(st.text('0123456789+-*/%()._e ', max_size=30))
def test_calculator_never_raises(expression):
  assert calculate(expression).content


def test_python_shows_output_and_how_it_ended():
  call = builtin_tools.python().call
  assert call({'code': 'print(1)'}, CTX) == ToolResult('1')
  assert call({'code': ''}, CTX) == ToolResult('[no output]')
  failed = call({'code': 'print(1)\n1/0'}, CTX)
  lines = failed.content.splitlines()
  assert not failed.ok and (lines[0], lines[-1]) == ('1', '[exit status 1]')
  flood = call({'code': 'import sys\nprint("x" * 99999)\nsys.exit("y" * 99999)'}, CTX)
  assert len(flood.content) < 16384 and flood.content.endswith('[exit status 1]')


def test_python_runs_in_the_sandbox_that_it_is_given():
  from zppo_jax.agents import sandbox
  seen = []

  def run(code, *, stdin='', limits):
    seen.append((code, limits))
    return sandbox.Result('', '', 'timeout', -9)

  limits = sandbox.Limits(wall_s=2)
  result = builtin_tools.python(limits, run).call({'code': 'x'}, CTX)
  assert seen == [('x', limits)]
  assert not result.ok and result.content.startswith('[stopped after 2 s')


SCRIPT = """CREATE TABLE t(a, b); INSERT INTO t VALUES (1, 'x'), (NULL, x'00ff');
            CREATE VIRTUAL TABLE f USING fts5(body); INSERT INTO f VALUES ('hello world');"""


@pytest.fixture(params=['path', 'script'])
def query(request, tmp_path):
  path = tmp_path / 'a b?#%.db'
  connection = sqlite3.connect(path)
  connection.executescript(SCRIPT)
  connection.close()
  source = {'path': path} if request.param == 'path' else {'script': SCRIPT}
  call = builtin_tools.sql(**source, max_rows=5, wall_s=0.5).call
  return lambda text: call({'query': text}, CTX)


def test_sql_answers(query):
  assert query('SELECT * FROM t') == ToolResult("a | b\n1 | x\nNULL | x'00ff'")
  assert query("SELECT * FROM f WHERE f MATCH 'hello' ORDER BY rank").content.endswith('world')
  assert query("SELECT CAST(x'ff61' AS TEXT) AS t").content == 't\n\ufffda'
  assert query("SELECT count(*) FROM sqlite_master WHERE name = 't'").content == 'count(*)\n1'


@pytest.mark.parametrize('text', [
  'INSERT INTO t VALUES (3, 4)', 'DELETE FROM t', 'DROP TABLE t', 'CREATE TABLE u(a)',
  'CREATE TEMP TABLE u(a)', "INSERT INTO f VALUES ('x')", "ATTACH ':memory:' AS other",
  'PRAGMA query_only = OFF', 'PRAGMA table_info(t)', "SELECT * FROM pragma_table_info('t')",
  "VACUUM INTO 'copy.db'", "SELECT load_extension('x')", 'SELECT 1; SELECT 2', 'SELECT * FROM u',
  'SELECT zeroblob(100000000)', 'SELEKT', "SELECT '\0'", "SELECT '\ud800'"])
def test_sql_refuses(query, text, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  before = sorted(tmp_path.iterdir())
  result = query(text)
  assert not result.ok and result.content.startswith('error: ')
  assert query('SELECT count(*) FROM t').content == 'count(*)\n2'
  assert sorted(tmp_path.iterdir()) == before


NUMBERS = 'WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) '


def test_sql_stops_endless_queries(query):
  start = time.monotonic()
  result = query(NUMBERS + 'SELECT count(*) FROM n')
  assert result == ToolResult('error: stopped after 0.5 s', ok=False)
  assert time.monotonic() - start < 5


A = "printf('%.*c', 262000, 'a')"


@pytest.mark.parametrize('text', [
  f"SELECT {A} LIKE '%' || replace(substr({A}, 1, 400), 'a', 'a_') || 'b'",
  f"SELECT count(instr({A}, substr({A}, 1, 60000) || x)) FROM n"])
def test_sql_stops_slow_functions(query, text):
  start = time.monotonic()
  assert not query((NUMBERS if text.endswith(' n') else '') + text).ok
  assert time.monotonic() - start < 5


def test_sql_limits_rows_and_size(query):
  assert query(NUMBERS + 'SELECT x FROM n').content == 'x\n1\n2\n3\n4\n5\n[more rows than these 5]'
  wide = query(NUMBERS + "SELECT printf('%.*c', 60000, 'x') FROM n LIMIT 5").content
  assert wide.endswith('[more rows than these 2]') and len(wide) < 150_000


def test_sql_needs_one_database(tmp_path):
  for arguments in ({}, {'path': tmp_path, 'script': SCRIPT}):
    with pytest.raises(ValueError, match='path or script'):
      builtin_tools.sql(**arguments)
  with pytest.raises(FileNotFoundError, match='none.db'):
    builtin_tools.sql(tmp_path / 'none.db')
  with pytest.raises(sqlite3.Error):
    builtin_tools.sql(script='CREATE nonsense')


def test_built_in_tools_go_through_the_runner():
  box = tools.toolbox(builtin_tools.calculator(), builtin_tools.python(),
                      builtin_tools.sql(script=SCRIPT))
  calls = [ToolCall('1', 'calculator', {'expression': '6*7'}),
           ToolCall('2', 'python', {'code': 'print(6*7)'}),
           ToolCall('3', 'sql', {'query': 'SELECT 6*7 AS x'}),
           ToolCall('4', 'sql', {'sql': 'SELECT 1'})]
  answers = run_calls(calls, box, CTX)
  assert [m.content for m in answers.messages[:3]] == ['42', '42', 'x\n42']
  assert (answers.num_errors, answers.num_failed) == (1, 0)
