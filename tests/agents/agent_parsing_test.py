"""Notations of tool calls: what they read, that they never raise, and that they read what they
write."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo_jax.agents import parsing
from zppo_jax.core.types import ToolCall, ToolSpec

PARSERS = parsing.PARSERS


def call(i, name, **arguments):
  return ToolCall(f'call_{i}', name, arguments)


def spec(name, *arguments):
  properties = {a: {'type': 'string'} for a in arguments}
  return ToolSpec(name, f'Does {name}.', {'type': 'object', 'properties': properties,
                                          'required': list(arguments)})


# Pieces of which a text becomes nearly a call.
PIECES = ['<think>', '</think>', '<tool_call>', '</tool_call>', '<a>', '</a>', '<b>', '</b>',
          '```', '```json\n', '```python\n', '```bash\n', '\n```\n', '\n', 'go[', ']', '[',
          '{"name": "a"}', '{"name": "a", "arguments": {"x": 1}}', '[[', 'NaN', '1e999',
          '"\\ud800"']
TEXTS = st.one_of(
  st.text(st.characters(exclude_categories=())),
  st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3))).map(''.join),
)
JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(PIECES)
  | st.floats(allow_nan=False, allow_infinity=False),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
  max_leaves=6,
)
NAMES = st.from_regex(r'[A-Za-z_]\w{0,8}', fullmatch=True)


def number(pairs):
  return tuple(ToolCall(f'call_{i}', *pair) for i, pair in enumerate(pairs))


@pytest.mark.parametrize('name', sorted(PARSERS))
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_parse_is_total(name, text):
  result = PARSERS[name].parse(text)
  assert [c.id for c in result.calls] == [f'call_{i}' for i in range(len(result.calls))]
  assert all(isinstance(c.arguments, dict) and c.name for c in result.calls)
  assert result.content == result.content.strip()
  if not result.calls:
    assert result.content == text.strip()


@pytest.mark.parametrize('name', ['hermes', 'json_block'])
@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(st.text(min_size=1),
                                st.dictionaries(st.text(), JSON, max_size=3)), max_size=3))
def test_json_notations_express_everything(name, pairs):
  calls = number(pairs)
  result = PARSERS[name].parse(PARSERS[name].render(calls))
  assert result == parsing.ParseResult(calls, '')
  types = [[type(v) for v in c.arguments.values()] for c in result.calls]
  assert types == [[type(v) for v in c.arguments.values()] for c in calls]


@pytest.mark.parametrize('name', ['xml_tags', 'code_block', 'bracket'])
@settings(max_examples=150, deadline=None)
@given(verb=st.sampled_from(['python', 'bash']) | NAMES,
       body=st.text() | st.lists(st.sampled_from(PIECES)).map(''.join), count=st.integers(0, 3))
def test_text_notations_read_back_what_they_write(name, verb, body, count):
  parser = PARSERS[name]
  calls = number([(verb, {parser.argument: body})] * count)
  try:
    text = parser.render(calls)
  except ValueError:
    return
  assert parser.parse(text) == parsing.ParseResult(calls, '')


@pytest.mark.parametrize(('name', 'verb', 'body'), [
  ('xml_tags', 'search', ' a < b\n<item>x</item> '), ('xml_tags', 'note', ''),
  ('code_block', 'python', 'print(1)\n'), ('code_block', 'bash', 'a="```"\n\n'),
  ('code_block', 'python', ''), ('code_block', 'python', 'tag = "<think>"'),
  ('bracket', 'click', 'red, size 7 (EU)'), ('bracket', 'click', '')])
def test_text_notations_express_ordinary_calls(name, verb, body):
  calls = (ToolCall('call_0', verb, {PARSERS[name].argument: body}),)
  assert PARSERS[name].parse(PARSERS[name].render(calls)).calls == calls


@pytest.mark.parametrize('name', ['hermes', 'json_block'])
@pytest.mark.parametrize('value', ['</think>', '</tool_call>', '<think>'])
def test_tags_may_stand_in_json_arguments(name, value):
  calls = (call(0, 'f', x=value),)
  assert PARSERS[name].parse(PARSERS[name].render(calls)).calls == calls


def test_ids_are_no_part_of_a_notation():
  text = PARSERS['bracket'].render([ToolCall('chatcmpl-7', 'go', {'arg': 'x'})])
  assert PARSERS['bracket'].parse(text).calls == (call(0, 'go', arg='x'),)


@pytest.mark.parametrize(('name', 'calls', 'complaint'), [
  ('hermes', [call(0, 'f', x=float('nan'))], 'JSON'),
  ('hermes', [call(0, 'f', x=object())], 'JSON'),
  ('hermes', [call(0, 'f', x=(1, 2))], "'f'"),
  ('hermes', [call(0, 'ok'), call(1, '')], 'call 1'),
  ('xml_tags', [call(0, 'f', body='</f>')], "'f'"),
  ('xml_tags', [call(0, 'f', query='x')], "'body'"),
  ('xml_tags', [call(0, 'two words', body='x')], 'two words'),
  ('xml_tags', [call(0, 'think', body='x')], 'think'),
  ('xml_tags', [call(0, 'f', body='</think>')], "'f'"),
  ('code_block', [call(0, 'python', code='a\n```\nb')], 'python'),
  ('code_block', [call(0, 'ruby', code='a')], 'ruby'),
  ('code_block', [call(0, 'bash', code='a'), call(1, 'bash', code='b')], '2 calls'),
  ('bracket', [call(0, 'go', arg='a]b')], "'go'"),
  ('bracket', [call(0, 'go', arg='a\nb')], "'go'"),
  ('bracket', [call(0, 'go', arg=3)], "'arg'")])
def test_render_names_what_it_cannot_express(name, calls, complaint):
  with pytest.raises(ValueError, match=complaint):
    PARSERS[name].render(calls)


def test_hermes_reads_the_good_calls_and_reports_the_others():
  result = PARSERS['hermes'].parse(
    'First <tool_call>\n{"name": "f", "arguments": {"x": [1, null]}}\n</tool_call> then'
    '<tool_call>{"name": "g"}</tool_call><tool_call>{broken}</tool_call> end <tool_call>{')
  assert result.calls == (call(0, 'f', x=[1, None]), call(1, 'g'))
  assert result.content == 'First  then<tool_call>{broken}</tool_call> end <tool_call>{'
  assert len(result.errors) == 2
  assert 'not closed' in result.errors[0] and 'JSON' in result.errors[1]


@pytest.mark.parametrize('body', [
  '[]', '3', '{"name": 3}', '{"name": ""}', '{"arguments": {}}', '{"name": "f", "arguments": "x"}',
  '{"name": "f", "parameters": {}}', '{"name": "f", "arguments": {"x": Infinity}}',
  '{"name": "f", "arguments": {"x": 1e999}}', '[' * 100_000,
  '{"name": "f", "arguments": {"x": ' + '[' * 99 + ']' * 99 + '}}', '{"name": "f"} {"name": "g"}',
  '{"name": "f", "arguments": {"x": ' + '9' * 5000 + '}}', ''])
def test_malformed_hermes_calls_are_errors(body):
  result = PARSERS['hermes'].parse(f'<tool_call>{body}</tool_call>')
  assert result.calls == () and len(result.errors) == 1


@pytest.mark.parametrize('name', ['hermes', 'json_block'])
def test_nesting_is_bounded_both_ways(name):
  def nested(depth):
    value = 1
    for i in range(depth):
      value = [value] if i % 2 else {'k': value}
    return [call(0, 'f', x=value)]

  render = PARSERS[name].render
  assert PARSERS[name].parse(render(nested(61))).calls == tuple(nested(61))
  with pytest.raises(ValueError, match="'f'"):
    render(nested(62))


def test_xml_tags_come_in_order_and_do_not_nest():
  text = 'x <b>1</b> <a>2 <b>3</b></a> <a>4</b> a<br>c</none>'
  result = PARSERS['xml_tags'].parse(text)
  assert result.calls == (call(0, 'b', body='1'), call(1, 'a', body='2 <b>3</b>'))
  assert result.content == 'x   <a>4</b> a<br>c</none>'
  assert result.errors == ('<a> is not closed', '<br> is not closed')
  assert PARSERS['xml_tags'].parse('<br> <br>').errors == ('<br> is not closed',)


def test_json_block_holds_one_call_or_several():
  one, two = '{"name": "f", "arguments": {}}', '[{"name": "f"}, {"name": "g"}]'
  parse = PARSERS['json_block'].parse
  assert parse(f'So:\n```json\n{one}\n```\nDone.') == parsing.ParseResult(
    (call(0, 'f'),), 'So:\n\nDone.')
  assert parse(f'```json \r\n{two}\r\n```').calls == (call(0, 'f'), call(1, 'g'))
  refused = parse(f'```json\n{one}\n```\n```json\n{one}\n```')
  assert refused.calls == () and '2 blocks' in refused.errors[0]
  assert parse('```json\n[]\n```').errors == ('a list of calls is empty',)
  assert parse(f'```\n{one}\n```') == parsing.ParseResult((), f'```\n{one}\n```')


def test_one_code_block():
  parse = PARSERS['code_block'].parse
  assert parse('Try\n```bash\nls | wc\n```').calls == (call(0, 'bash', code='ls | wc'),)
  assert parse('```python\nx = 1\n\n```').calls == (call(0, 'python', code='x = 1\n'),)
  assert parse('```python\n```').calls == (call(0, 'python', code=''),)
  two = parse('```python\n1\n```\n```bash\n2\n```')
  assert two.calls == () and 'only one' in two.errors[0]
  assert parse('```python\n1').errors == ('```python is not closed',)
  assert parse('```ruby\n1\n```').errors == ()


def test_brackets():
  result = PARSERS['bracket'].parse('Thought: buy.\nAction: search[red shoes, 7] then click[ Buy ]')
  assert result.calls == (call(0, 'search', arg='red shoes, 7'), call(1, 'click', arg=' Buy '))
  assert PARSERS['bracket'].parse('see [1], f[a[b], 3x[\n]').calls == (call(0, 'a', arg='b'),)


@pytest.mark.parametrize(('name', 'text'), [
  ('hermes', '<tool_call>{"name": "f"}</tool_call>'), ('xml_tags', '<f>x</f>'),
  ('json_block', '\n```json\n{"name": "f"}\n```\n'), ('code_block', '\n```bash\nx\n```\n'),
  ('bracket', ' f[x] ')])
def test_thoughts_are_not_searched(name, text):
  parse = PARSERS[name].parse
  assert len(parse(text).calls) == 1
  for thought in (f'<think>{text}</think>', f'<think>{text}', f'{text}</think>'):
    assert parse(thought) == parsing.ParseResult((), thought.strip())
  both = parse(f'<think>{text}</think>{text}')
  assert len(both.calls) == 1 and both.content.startswith('<think>')
  before = parse(f'{text}<think>{text}</think>')
  assert before.calls == both.calls and before.content.endswith('</think>')


@pytest.mark.parametrize('name', sorted(PARSERS))
def test_reading_takes_linear_time(name):
  names = ''.join(f'<n{i}>' for i in range(20_000))
  start = time.monotonic()
  for text in (names, '<think>' * 20_000, '<tool_call>' * 20_000, '```python\n' * 20_000,
               '```json\n' * 20_000, 'a[' * 50_000, 'a' * 200_000, '<' * 100_000, '`' * 100_000):
    PARSERS[name].parse(text)
  assert time.monotonic() - start < 4


@pytest.mark.parametrize(('name', 'tool'), [
  ('hermes', spec('f', 'x', 'y')), ('json_block', spec('f', 'x', 'y')),
  ('xml_tags', spec('f', 'body')), ('code_block', spec('python', 'code')),
  ('bracket', spec('f', 'arg'))])
def test_tools_text_says_what_there_is(name, tool):
  text = parsing.tools_text([tool], name)
  assert tool.name in text and tool.description in text and PARSERS[name].usage in text
  assert parsing.tools_text([], name) == ''


def test_hermes_lists_tools_as_json():
  tools = [spec('f', 'x'), spec('g')]
  lines = parsing.tools_text(tools, 'hermes').split('<tools>\n')[1].split('\n</tools>')[0]
  functions = [json.loads(line)['function'] for line in lines.splitlines()]
  assert [ToolSpec(**f) for f in functions] == tools


@pytest.mark.parametrize(('name', 'tool', 'complaint'), [
  ('xml', spec('f'), "'xml' is not one of"), ('bracket', spec('f'), r'requires \[\]'),
  ('bracket', spec('f', 'arg', 'x'), r"requires \['arg', 'x'\]"),
  ('code_block', spec('ruby', 'code'), 'ruby'),
  ('xml_tags', spec('a b', 'body'), 'a b')])
def test_tools_text_refuses_tools_that_cannot_be_called(name, tool, complaint):
  with pytest.raises(ValueError, match=complaint):
    parsing.tools_text([tool], name)
