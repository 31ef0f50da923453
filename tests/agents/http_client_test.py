import contextlib
import dataclasses
import gzip
import http.server
import json
import logging
import os
import socket
import threading
import time

import numpy as np
import pytest

pytest.importorskip('httpx')

from zppo_jax.agents import http_client, llm  # noqa: E402
from zppo_jax.agents.records import GenRequest, Usage  # noqa: E402
from zppo_jax.core import errors, types  # noqa: E402

KEY = 'sk-very-secret-0123456789'


@dataclasses.dataclass(frozen=True)
class Reply:
  body: object = b''  # bytes as they are, anything else as JSON
  status: int = 200
  headers: dict = dataclasses.field(default_factory=dict)
  delay: float = 0.0
  drip: float = 0.0  # seconds between two bytes
  hang: bool = False


def choice(text='hi', finish='stop', **message):
  return {'message': {'role': 'assistant', 'content': text} | message, 'finish_reason': finish}


def chat(*texts, usage=None):
  return Reply({'choices': [choice(t) for t in texts]} | ({'usage': usage} if usage else {}))


def text_of(body):
  return body['messages'][0]['content']


def by_text(replies):
  return lambda body: replies[text_of(body)]


class Server(http.server.ThreadingHTTPServer):
  """Answers by a function of the request's JSON, or by a list of which the last is repeated."""

  daemon_threads = True
  block_on_close = False
  request_queue_size = 64

  def __init__(self, script):
    super().__init__(('127.0.0.1', 0), Handler)
    self.url = f'http://127.0.0.1:{self.server_port}/v1'
    self.seen, self.script, self.lock = [], script, threading.Lock()
    self.now, self.most = 0, 0
    self.ended = threading.Event()

  def answer(self, path, headers, body):
    with self.lock:
      self.seen.append((path, headers, body))
      self.now += 1
      self.most = max(self.most, self.now)
      if callable(self.script):
        return self.script(body)
      return self.script[min(len(self.seen), len(self.script)) - 1]

  @property
  def bodies(self):
    return [body for _, _, body in self.seen]


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True  # else 40 ms for each reply

  def do_POST(self):
    raw = self.rfile.read(int(self.headers['Content-Length']))
    reply = self.server.answer(self.path, dict(self.headers), json.loads(raw))
    self.server.ended.wait(30 if reply.hang else reply.delay)
    with self.server.lock:
      self.server.now -= 1
    data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
    with contextlib.suppress(OSError):
      self.send_response(reply.status)
      for name, value in ({'Content-Length': len(data)} | reply.headers).items():
        self.send_header(name, str(value))
      self.end_headers()
      for i in range(len(data)) if reply.drip else ():
        self.wfile.write(data[i:i + 1])
        self.server.ended.wait(reply.drip)
      self.wfile.write(b'' if reply.drip else data)

  def log_message(self, *unused):
    pass


@pytest.fixture
def start(monkeypatch):
  """Functions (script, **options) -> (server, client); all end with the test."""
  for name in ('NO_PROXY', 'no_proxy'):
    monkeypatch.setenv(name, '127.0.0.1')
  with contextlib.ExitStack() as stack:
    def run(script, **options):
      server = Server(script)
      thread = threading.Thread(target=server.serve_forever, args=(0.01,))
      thread.start()
      options = {'sleep': lambda s: None, 'uniform': lambda: 0.0} | options
      client = http_client.HTTPClient(server.url, 'tiny', **options)
      for end in (thread.join, server.server_close, server.shutdown, server.ended.set,
                  client.close):
        stack.callback(end)
      return server, client
    yield run


def ask(text='2+2?', **options):
  return GenRequest((types.Message('user', text),), **options)


def one(client, request=None):
  [completion] = client.generate([request or ask()])
  return completion


def test_the_request_on_the_wire(start):
  server, client = start([chat('4')], extra={'reasoning_effort': 'low'}, tokens_field='max_new')
  tool = types.ToolSpec('add', 'Adds.', {'type': 'object'})
  call = types.ToolCall('c1', 'add', {'a': 2})
  messages = (types.Message('user', '2+2?'),
              types.Message('assistant', '', tool_calls=(call,)),
              types.Message('tool', '4', tool_call_id='c1', name='add'))
  request = GenRequest(messages, tools=(tool,), max_tokens=7, temperature=0.5, top_p=0.9,
                       stop=('\n',), seed=3)
  assert one(client, request).text == '4'
  [(path, headers, body)] = server.seen
  assert path == '/v1/chat/completions'
  assert 'Authorization' not in headers
  assert body == {
    'model': 'tiny', 'max_new': 7, 'temperature': 0.5, 'top_p': 0.9, 'stop': ['\n'], 'seed': 3,
    'reasoning_effort': 'low',
    'tools': [{'type': 'function', 'function': {'name': 'add', 'description': 'Adds.',
                                                'parameters': {'type': 'object'}}}],
    'messages': [
      {'role': 'user', 'content': '2+2?'},
      {'role': 'assistant', 'content': '',
       'tool_calls': [{'id': 'c1', 'type': 'function',
                       'function': {'name': 'add', 'arguments': '{"a": 2}'}}]},
      {'role': 'tool', 'content': '4', 'tool_call_id': 'c1', 'name': 'add'}]}


def test_a_complaint_about_no_call_is_sent_as_the_users(start):
  server, client = start([chat('4')])
  one(client, GenRequest((types.Message('user', 'a'), types.Message('tool', 'error: not closed'))))
  assert server.bodies[0]['messages'][1] == {'role': 'user', 'content': 'error: not closed'}


def test_a_plain_request_sends_no_empty_fields(start):
  server, client = start([chat('4')])
  one(client)
  assert set(server.bodies[0]) == {'model', 'messages', 'max_tokens', 'temperature', 'top_p'}


def test_waits_as_the_server_asks(start):
  waits = []
  _, client = start([Reply(b'slow down', 429, {'Retry-After': 7}), chat('4')], sleep=waits.append)
  assert one(client).text == '4'
  assert waits == [7.0]


def test_a_date_to_retry_after_is_not_read(start):
  waits = []
  _, client = start([Reply(b'', 503, {'Retry-After': 'Wed, 21 Oct 2026 07:28:00 GMT'}), chat('4')],
                    sleep=waits.append)
  assert one(client).text == '4'
  assert waits == [0.0]


def test_three_faults_then_an_answer(start):
  server, client = start(lambda body: next(replies))
  for status in (408, 429, 500, 502, 503):
    replies = iter([Reply(b'oh', status)] * 3 + [chat(str(status))])
    assert one(client).text == str(status)
  assert len(server.seen) == 20


def test_jitter_is_full_and_its_bound_doubles_to_a_limit(start):
  waits = []
  start_waits = {'sleep': waits.append, 'uniform': lambda: 0.5, 'deadline_s': 1e6}
  _, client = start([Reply(b'', 500)], retries=9, **start_waits)
  one(client)
  assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]


def test_a_lasting_fault_is_an_error_of_its_request_alone(start):
  server, client = start(by_text({'a': chat('4'), 'b': chat('4'), 'bad': Reply(b'x' * 999, 500)}),
                         retries=2)
  answers = client.generate([ask('a'), ask('bad', n=2), ask('b')])
  assert [a.finish for a in answers] == ['stop', 'error', 'error', 'stop']
  assert answers[1].error == f'status 500: {"x" * 200}'
  assert answers[1].text == ''
  assert [text_of(b) for b in server.bodies].count('bad') == 3


def test_other_statuses_fail_at_once(start):
  statuses = [201, 302, 400, 401, 404, 422]
  server, client = start(by_text({str(s): Reply(b'no such model', s, {'Location': '/v2'})
                                  for s in statuses}))
  answers = client.generate([ask(str(s)) for s in statuses])
  assert [a.error for a in answers] == [f'status {s}: no such model' for s in statuses]
  assert {a.finish for a in answers} == {'error'}
  assert len(server.seen) == len(statuses)


MALFORMED = [
  b'<html>', b'', b'\xff\xfe', b'[' * 100_000, b'[]', b'null', b'{"error": "busy"}',
  b'{"choices": []}', b'{"choices": [{"finish_reason": "stop"}]}', b'{"choices": [3]}',
  b'{"choices": [{"message": null, "finish_reason": "stop"}]}',
  b'{"choices": [{"message": {"content": ["a"]}, "finish_reason": "stop"}]}',
  b'{"choices": [{"message": {"tool_calls": [{}]}, "finish_reason": "stop"}]}',
]


def test_an_unreadable_answer_is_an_error_after_one_retry(start):
  server, client = start(by_text({str(i): Reply(raw) for i, raw in enumerate(MALFORMED)}))
  answers = client.generate([ask(str(i)) for i in range(len(MALFORMED))])
  for raw, answer in zip(MALFORMED, answers):
    assert answer.finish == 'error', raw
    assert answer.error.startswith('unreadable answer, '), raw
    assert answer.error.endswith(f': {raw[:200].decode("utf-8", "replace")}'), raw
  assert len(server.seen) == 2 * len(MALFORMED)


def test_an_unreadable_answer_may_be_followed_by_a_good_one(start):
  _, client = start([Reply(b'{"choices"'), chat('4')])
  assert one(client).text == '4'


def test_wrongly_packed_bytes_are_an_error_after_one_retry(start):
  cut = gzip.compress(b'{}')[:-9] + b'garbage'
  server, client = start([Reply(cut, headers={'Content-Encoding': 'gzip'})])
  assert 'DecodingError' in one(client).error
  assert len(server.seen) == 2


def test_a_hang_ends_at_the_deadline(start):
  server, client = start(by_text({'hang': Reply(hang=True), 'go': chat('4')}), deadline_s=0.3)
  began = time.monotonic()
  hung, good = client.generate([ask('hang'), ask('go')])
  assert 0.25 < time.monotonic() - began < 2
  assert hung.finish == 'error' and 'ReadTimeout' in hung.error and 'deadline_s=0.3' in hung.error
  assert good.text == '4'
  assert len(server.seen) == 2


def test_a_body_that_drips_ends_at_the_deadline(start):
  _, client = start([Reply({'choices': [choice('x' * 500)]}, drip=0.02)], deadline_s=0.3)
  began = time.monotonic()
  assert 'deadline_s=0.3' in one(client).error
  assert time.monotonic() - began < 2


def test_a_body_that_stalls_late_ends_at_the_deadline(start):
  _, client = start([Reply(b'{', headers={'Content-Length': 9}, delay=0.35)], deadline_s=0.5)
  began = time.monotonic()
  assert 'ReadTimeout' in one(client).error
  assert time.monotonic() - began < 0.7


def test_no_wait_beyond_the_deadline(start):
  waits = []
  server, client = start([Reply(b'later', 429, {'Retry-After': 60}), chat('4')], deadline_s=5,
                         sleep=waits.append)
  answer = one(client)
  assert answer.error == 'status 429: later (waiting 60 s would pass deadline_s=5)'
  assert waits == [] and len(server.seen) == 1


def test_a_refused_connection_is_retried_and_then_an_error(start):
  with socket.socket() as unused:
    unused.bind(('127.0.0.1', 0))
    port = unused.getsockname()[1]
  waits = []
  with http_client.HTTPClient(f'http://127.0.0.1:{port}', 'm', retries=2, sleep=waits.append
                              ) as client:
    answer = one(client)
  assert answer.finish == 'error' and 'ConnectError' in answer.error
  assert len(waits) == 2


def test_answers_keep_the_order_of_the_requests(start):
  def script(body):
    i = int(text_of(body))
    return dataclasses.replace(chat(f'answer {i}'), delay=0.05 * (4 - i))
  server, client = start(script, concurrency=5)
  answers = client.generate([ask(str(i)) for i in range(5)])
  assert [a.text for a in answers] == [f'answer {i}' for i in range(5)]
  assert server.most > 1


def test_concurrency_is_bounded_over_all_calls(start):
  server, client = start([dataclasses.replace(chat('4'), delay=0.05)], concurrency=3)
  calls = [threading.Thread(target=client.generate, args=([ask()] * 6,)) for _ in range(2)]
  for call in calls:
    call.start()
  for call in calls:
    call.join()
  assert len(server.seen) == 12
  assert server.most == 3


def test_n_answers_from_one_reply(start):
  usage = {'prompt_tokens': 5, 'completion_tokens': 9}
  server, client = start([chat('a', 'b', 'c', usage=usage)])
  answers = client.generate([ask(n=3)])
  assert [a.text for a in answers] == ['a', 'b', 'c']
  assert [a.usage for a in answers] == [Usage(5, 9), None, None]
  assert [b.get('n') for b in server.bodies] == [3]


def test_a_server_that_gives_one_answer_is_asked_again_with_other_noise(start):
  server, client = start(lambda b: chat(f'seed {b["seed"]}'))
  answers = client.generate([ask(n=3, seed=1), ask(n=1, seed=1), ask(n=3, seed=1)])
  assert [b.get('n') for b in server.bodies].count(3) == 2
  texts = [a.text for a in answers]
  assert texts[0] == texts[3] == 'seed 1'
  assert len(set(texts[:3])) == 3
  assert texts[:3] == texts[4:]


def test_more_answers_than_wanted_are_cut(start):
  _, client = start([chat('a', 'b', 'c')])
  assert [a.text for a in client.generate([ask(n=2)])] == ['a', 'b']


def test_answers_in_hand_outlive_a_later_fault(start):
  _, client = start([chat('a'), Reply(b'', 400)])
  assert [a.finish for a in client.generate([ask(n=3)])] == ['stop', 'error', 'error']


def call_of(arguments, **fields):
  return {'type': 'function', 'function': {'name': 'add', 'arguments': arguments}} | fields


def test_tool_calls_are_read(start):
  calls = [call_of('{"a": 1}', id='c7'), call_of(''), call_of({'b': 2}), call_of(None)]
  _, client = start([Reply({'choices': [choice(None, 'tool_calls', tool_calls=calls)]})])
  answer = one(client)
  assert (answer.text, answer.finish, answer.error) == ('', 'tool', '')
  assert answer.tool_calls == (
    types.ToolCall('c7', 'add', {'a': 1}), types.ToolCall('call_1', 'add', {}),
    types.ToolCall('call_2', 'add', {'b': 2}), types.ToolCall('call_3', 'add', {}))


def test_arguments_that_cannot_be_read_are_named(start):
  deep = f'{{"a": {"[" * 99}{"]" * 99}}}'  # it could be read, but not everywhere written again
  wrong = ['{"a": ', '[1]', '7', 7, '[' * 100_000, '{"a": NaN}', {'a': float('inf')}, deep]
  replies = {str(i): Reply({'choices': [choice('so', 'tool_calls', tool_calls=[
    call_of('{}', id='c0'), call_of(arguments, id='c1')])]}) for i, arguments in enumerate(wrong)}
  server, client = start(by_text(replies))
  for answer in client.generate([ask(text) for text in replies]):
    assert (answer.text, answer.finish) == ('so', 'tool')
    assert answer.tool_calls == (types.ToolCall('c0', 'add', {}),)
    assert answer.error.startswith('tool_calls[1] (add): arguments: ')
  assert len(server.seen) == len(wrong)


def test_how_an_answer_ended(start):
  call, filtered, none = call_of('{}'), "finish_reason 'content_filter'", 'finish_reason None'
  cases = [('stop', [], 'stop', ''), ('length', [], 'length', ''), ('stop', [call], 'tool', ''),
           ('tool_calls', [], 'stop', ''), ('length', [call], 'length', ''),
           ('content_filter', [], 'error', filtered), (None, [], 'error', none)]
  _, client = start([Reply({'choices': [choice('so', reason, tool_calls=calls)
                                        for reason, calls, _, _ in cases]})])
  answers = client.generate([ask(n=len(cases))])
  assert [(a.text, a.finish, a.error) for a in answers] == [('so', *c[2:]) for c in cases]


def test_logprobs_only_where_declared(start):
  content = [{'token': 'h', 'logprob': -0.5}, {'token': 'i', 'logprob': -2}]
  script = [Reply({'choices': [choice() | {'logprobs': {'content': content}}]})]
  server, client = start(script, logprobs=True)
  assert client.capabilities == {'tools', 'json', 'logprobs'}
  answer = one(client)
  assert answer.logprobs == (-0.5, -2.0) and answer.token_ids is None
  assert server.bodies[0]['logprobs'] is True
  server, client = start(script)
  assert client.capabilities == {'tools', 'json'}
  assert one(client).logprobs is None
  assert 'logprobs' not in server.bodies[0]


def everything(folder):
  return ''.join(p.read_text() + p.name for p in folder.iterdir())


def test_the_key_is_in_the_header_and_nowhere_else(start, monkeypatch, tmp_path, caplog):
  caplog.set_level(logging.DEBUG)
  monkeypatch.setenv('A_KEY', f'{KEY}\n')
  echo = Reply(f'{"x" * 170}wrong key {KEY}'.encode(), 401)
  twisted = Reply({'choices': [choice() | {'logprobs': {'content': [{'logprob': KEY}]}}]})
  replies = {'echo': echo, 'twisted': twisted, 'say it': chat(f'it is {KEY}'), 'hi': chat('hi')}
  server, client = start(by_text(replies), api_key_env='A_KEY',
                         cache_dir=str(tmp_path))
  answers = client.generate([ask(text, seed=0) for text in replies])
  assert {headers['Authorization'] for _, headers, _ in server.seen} == {f'Bearer {KEY}'}
  assert [a.finish for a in answers] == ['error', 'error', 'stop', 'stop']
  assert len(list(tmp_path.iterdir())) == 1
  texts = [answers[0].error, answers[1].error, repr(client), repr(vars(client)), caplog.text,
           json.dumps(server.bodies), everything(tmp_path)]
  assert 'HTTP Request' in caplog.text  # something was logged
  assert not any('sk-very' in text for text in texts)


def test_the_key_is_read_at_every_call(start, monkeypatch):
  server, client = start([chat('4')], api_key_env='A_KEY')
  for key in ('one', 'two'):
    monkeypatch.setenv('A_KEY', key)
    one(client)
  assert [s[1]['Authorization'] for s in server.seen] == ['Bearer one', 'Bearer two']


@pytest.mark.parametrize('value', [None, '', ' \n'])
def test_a_missing_key_is_named_before_any_request(start, monkeypatch, value):
  monkeypatch.delenv('A_KEY', raising=False)
  if value is not None:
    monkeypatch.setenv('A_KEY', value)
  server, client = start([chat('4')], api_key_env='A_KEY')
  for call in (lambda: client.generate([ask()]), lambda: client.embed(['a'])):
    with pytest.raises(errors.UserError, match='A_KEY'):
      call()
  assert server.seen == []


@pytest.mark.parametrize('value', [f'{KEY}\nX: y', f'{KEY}é'])
def test_a_key_that_no_header_can_hold_is_not_quoted(start, monkeypatch, value):
  monkeypatch.setenv('A_KEY', value)
  server, client = start([chat('4')], api_key_env='A_KEY')
  with pytest.raises(errors.UserError, match='A_KEY') as raised:
    client.generate([ask()])
  assert 'sk-very' not in str(raised.value) and server.seen == []


@pytest.mark.parametrize('options', [{'temperature': 0.0}, {'seed': 5}])
def test_the_cache_spares_a_second_request(start, tmp_path, options):
  usage = {'prompt_tokens': 5, 'completion_tokens': 9}
  server, client = start([chat('a', 'b', usage=usage), chat('c', 'd')], cache_dir=str(tmp_path))
  first = client.generate([ask(n=2, **options)])
  assert client.generate([ask(n=2, **options)]) == first
  assert len(server.seen) == 1
  assert [p.suffix for p in tmp_path.iterdir()] == ['.json']


def test_the_cache_outlives_the_client_and_knows_the_model(start, tmp_path):
  server, client = start([chat('a'), chat('b')], cache_dir=str(tmp_path))
  one(client, ask(seed=1))
  for model, text in (('tiny', 'a'), ('other', 'b')):
    with http_client.HTTPClient(server.url, model, cache_dir=str(tmp_path)) as again:
      assert one(again, ask(seed=1)).text == text


@pytest.mark.parametrize('other', [
  {'seed': 2}, {'text': '2+3?'}, {'max_tokens': 9}, {'n': 2}, {'stop': ('x',)}])
def test_another_request_is_not_answered_from_the_cache(start, tmp_path, other):
  server, client = start([chat('a', 'b')], cache_dir=str(tmp_path))
  one(client, ask(seed=1))
  for _ in range(2):
    client.generate([ask(**({'seed': 1} | other))])
    one(client, ask(seed=1))
  assert len(server.seen) == 2


def test_sampling_without_a_seed_is_never_cached(start, tmp_path):
  server, client = start([chat('a'), chat('b')], cache_dir=str(tmp_path))
  assert [one(client).text for _ in range(2)] == ['a', 'b']
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('fault', [
  Reply(b'', 400), Reply(b'{}'), Reply({'choices': [choice('so', 'content_filter')]})])
def test_errors_are_not_cached(start, tmp_path, fault):
  _, client = start([fault, fault, chat('b')], cache_dir=str(tmp_path), retries=0)
  assert [one(client, ask(seed=1)).finish for _ in range(3)] == ['error', 'error', 'stop']


@pytest.mark.parametrize('text', ['', '[[', '[]', '{}', '[[{}, null]]', '[1]', '\x00'])
def test_a_corrupt_cache_file_is_rewritten(start, tmp_path, text):
  server, client = start([chat('a'), chat('b')], cache_dir=str(tmp_path))
  one(client, ask(seed=1))
  [path] = tmp_path.iterdir()
  path.write_text(text)
  assert [one(client, ask(seed=1)).text for _ in range(2)] == ['b', 'b']
  assert len(server.seen) == 2


def test_a_cache_that_cannot_be_written_loses_no_answer(start, tmp_path, monkeypatch, caplog):
  def full(*unused):
    raise OSError('no space left')
  _, client = start([chat('a')], cache_dir=str(tmp_path))
  monkeypatch.setattr(os, 'replace', full)
  assert one(client, ask(seed=1)).text == 'a'
  assert 'no space left' in caplog.text and list(tmp_path.iterdir()) == []


def test_requests_that_no_server_can_be_asked(start):
  server, client = start([chat('4')])
  for request, why in ((GenRequest(token_ids=(1, 2)), 'tokenise anew'), (GenRequest(), 'messages'),
                       (ask(n=0), 'n 0')):
    with pytest.raises(ValueError, match=why):
      client.generate([ask(), request])
  with pytest.raises(llm.Unsupported):
    client.score([])
  assert client.generate([]) == []
  client.close()  # waits for what is under way
  assert server.seen == []


@pytest.mark.parametrize('url, options, why', [
  ('http://h', {'concurrency': 0}, 'concurrency'), ('http://h', {'retries': -1}, 'retries'),
  ('http://h', {'deadline_s': float('nan')}, 'deadline_s'),
  ('http://h', {'deadline_s': float('inf')}, 'deadline_s'), ('http://h:99999', {}, 'base_url'),
  ('http://[::1', {}, 'base_url'), ('http://a..b', {}, 'base_url'),
  ('http://h\0', {}, 'base_url'), ('http://h', {'extra': {'n': 2}}, 'n'),
  ('h:80/v1', {}, 'base_url'), (f'https://u:{KEY}@h/v1', {}, 'base_url'),
  (f'https://h/v1?key={KEY}', {}, 'base_url')])
def test_bad_arguments_are_named(url, options, why):
  with pytest.raises(errors.UserError, match=why) as raised:
    http_client.HTTPClient(url, 'm', **options)
  assert 'sk-very' not in str(raised.value)


def vectors(body):
  rows = [{'index': i, 'embedding': [len(t), 1.0]} for i, t in enumerate(body['input'])]
  return Reply({'data': rows[::-1]})


def test_embeddings_are_unit_rows_in_order(start):
  server, client = start(vectors)
  texts = ['a' * (1 + i % 7) for i in range(150)]  # several requests
  rows = client.embed(texts)
  assert rows.shape == (150, 2) and rows.dtype == np.float32
  np.testing.assert_allclose(rows[:, 0] / rows[:, 1], [len(t) for t in texts], rtol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
  assert {path for path, _, _ in server.seen} == {'/v1/embeddings'} and len(server.seen) == 3
  assert client.embed([]).shape == (0, 0)


@pytest.mark.parametrize('reply', [
  Reply(b'no', 400), Reply({'data': []}), Reply({'data': [{'index': 0, 'embedding': [0.0, 0.0]}]}),
  Reply(b'{"data": [{"index": 0, "embedding": [NaN]}]}'),
  Reply(b'{"data": [{"index": 0, "embedding": [Infinity]}]}'),
  Reply({'data': [{'index': i, 'embedding': [1.0]} for i in range(2)]})])
def test_a_failed_embedding_is_an_exception(start, reply):
  _, client = start([reply])
  with pytest.raises(RuntimeError, match='embeddings: '):
    client.embed(['a'])


def workers():
  return {t for t in threading.enumerate() if t.name.startswith('ThreadPoolExecutor')}


def test_after_close_nothing_is_asked_and_no_worker_is_left(start):
  before = workers()
  server, client = start([chat('4')])
  with client:
    one(client)
    assert workers() - before
  with pytest.raises(RuntimeError):
    client.generate([ask()])
  assert len(server.seen) == 1
  assert not workers() - before
