"""Episodes: token for token what the model saw, every fault ends in its status, files resume."""

import dataclasses
import functools
import time

import jax
import numpy as np
import pytest

from zppo_jax import models
from zppo_jax.agents import builtin_tools, llm, loop, policy, react, traces
from zppo_jax.agents import tools as tools_lib
from zppo_jax.agents.records import Completion, GenRequest, Node, ScoreRequest, Status, Trace
from zppo_jax.core.types import Message, ToolCall
from zppo_jax.data import templates, tokenizer
from zppo_jax.envs import api, household
from zppo_jax.models import decoder
from zppo_jax.sampling import conversations

TOKENIZER = tokenizer.CharTokenizer()
CONFIG = models.ModelConfig(vocab=104, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8,
                            inter=48, rope_theta=1e4, num_valid=TOKENIZER.vocab_size)
CALCULATOR = tools_lib.toolbox(builtin_tools.calculator())
SPECS = [t.spec for t in CALCULATOR.values()]
AGENT = react.tool_agent(SPECS, 'xml_tags', system='')
LIMITS = loop.Limits(max_turns=4, turn_tokens=12, max_tokens=60)


def questions(count=3):
  return [api.Task(f'q{i}', dict(messages=(Message('user', f'{i}+1?'),))) for i in range(count)]


@functools.cache
def params():
  return models.init(CONFIG, jax.random.key(0))


def client(slots=4, key=0):
  return policy.PolicyClient(
    CONFIG, params(), TOKENIZER, 'plain', key=jax.random.key(key), max_new_tokens=12, version=7,
    shape=conversations.Shape(slots=slots, context=96, steps=4, chunks=(8, 32)))


def scripted(*replies):
  """Replies by how many answers the chat holds."""
  return llm.ScriptedClient(lambda r: replies[min(
    sum(m.role == 'assistant' for m in r.messages), len(replies) - 1)])


def play(model, tasks=None, agent=AGENT, limits=LIMITS, **kwargs):
  return loop.rollout(questions() if tasks is None else tasks, agent, dict(policy=model),
                      limits=limits, tools=CALCULATOR, **kwargs)


def test_a_tool_is_asked_and_its_answer_is_read():
  found = play(scripted('Let me see <calculator>6*7</calculator>', 'It is 42.'), questions(1))[0]
  assert (found.status, found.turns, found.text) == (Status.FINISHED, 2, 'It is 42.')
  said = [m for n in found.traces[0].nodes for m in n.messages]
  assert [m.role for m in said] == ['user', 'assistant', 'tool', 'assistant']
  assert said[2].content == '42' and said[2].name == 'calculator'
  assert found.info == dict(tool_calls=1, tool_errors=0)


def test_calls_that_a_server_has_read_are_answered():
  class Reads:
    capabilities = frozenset({'tools'})

    def generate(self, requests):
      call = ToolCall('c7', 'calculator', {'expression': '6*7'})
      return [Completion('It is 42.', 'stop') if len(r.messages) > 1 else
              Completion('', 'tool', tool_calls=(call,)) for r in requests]

  found = play(Reads(), questions(1))[0]
  nodes = found.traces[0].nodes
  assert found.status == Status.FINISHED and [n.parent for n in nodes] == [None, 0, 1, 2]
  assert nodes[2].messages == (Message('tool', '42', tool_call_id='c7', name='calculator'),)


class Writes:
  """A policy that draws freely, but is made to say some things: its tokens are as if sampled."""

  def __init__(self, inner, *replies):
    self.inner, self.replies = inner, replies
    self.capabilities, self.open, self.turn = inner.capabilities, inner.open, inner.turn
    self.stop_id = inner.stop_id
    self.requests = []

  def generate(self, requests):
    found = []
    for r, drawn in zip(requests, self.inner.generate(requests)):
      self.requests.append(r)
      turn = sum(m.role == 'assistant' for m in r.messages)
      if turn < len(self.replies):
        ids = (*TOKENIZER.encode(self.replies[turn]), TOKENIZER.eos_id)
        drawn = dataclasses.replace(drawn, text=self.replies[turn], token_ids=ids, finish='stop',
                                    logprobs=(-1.0,) * len(ids))
      found.append(drawn)
    return found


def test_a_row_is_token_for_token_what_the_model_saw():
  model = Writes(client(), '<calculator>1+1</calculator>', '<calculator>2*2</calculator>')
  found = play(model, group_size=2, limits=dataclasses.replace(LIMITS, max_tokens=80))
  for e in found:
    row, = traces.rows(e.traces[0])
    last = [r for r in model.requests if r.token_ids == tuple(row.tokens[:len(r.token_ids)])]
    answer = e.traces[0].nodes[-1]
    assert len(last) >= 3 and answer.sampled
    assert tuple(row.tokens) == (*max((r.token_ids for r in last), key=len), *answer.token_ids)
    text = TOKENIZER.decode(row.tokens, skip_special=False)
    assert text.startswith(f'{e.task[1:]}+1?<|sep|><calculator>1+1</calculator><|eos|>2<|sep|>')
    seen = ''.join(TOKENIZER.decode([t], skip_special=False)
                   for t, m in zip(row.tokens, row.loss_mask) if not m)
    assert seen == f'{e.task[1:]}+1?<|sep|>2<|sep|>4<|sep|>'
    assert not row.logp[~row.loss_mask].any() and (row.logp[row.loss_mask] < 0).all()
    assert set(row.version[row.loss_mask]) == {7} and row.turn[row.start] == 1
    assert (row.turn[:row.start] == 0).all() and row.turn[-1] == 3
  assert len({e.traces[0].nodes[-1].token_ids for e in found}) > 3  # samples differ


def test_episodes_depend_on_their_task_alone():
  strip = lambda found: [(e.status, e.text, [n.token_ids for n in e.traces[0].nodes])
                         for e in found]
  whole = strip(play(client()))
  assert strip(play(client(slots=1))) == whole
  assert strip(play(client(), list(reversed(questions()))))[::-1] == whole
  assert strip(play(client(), questions(1))) == whole[:1]
  assert strip(play(client(), sampling=loop.Sampling(seed=1))) != whole
  assert strip(play(client(key=1))) != whole


def test_log_probs_of_the_client_are_those_of_the_model():
  model = client()
  found = model.generate([GenRequest(messages=questions(1)[0].args['messages'], max_tokens=12,
                                     seed=3, n=2)])
  row = np.asarray([found[1].prompt_token_ids + found[1].token_ids])
  logp = jax.nn.log_softmax(decoder.forward(CONFIG, params(), row).logits[0])
  start = len(found[1].prompt_token_ids)
  wanted = [logp[start - 1 + i, t] for i, t in enumerate(found[1].token_ids)]
  np.testing.assert_allclose(found[1].logprobs, wanted, atol=1e-4)
  scored, = model.score([ScoreRequest(found[1].prompt_token_ids, found[1].token_ids)])
  np.testing.assert_allclose(scored.logprobs, wanted, atol=1e-5)
  assert found[0].token_ids != found[1].token_ids and found[0].version == 7


@pytest.mark.parametrize('version', [7, 8])
def test_new_weights_count_from_the_next_call_on(version):
  ask = [GenRequest(messages=questions(1)[0].args['messages'], max_tokens=12, seed=3)]
  model, other = client(), jax.tree.map(lambda x: -x, params())
  before = model.generate(ask)[0]
  model.update(other, version)
  after = model.generate(ask)[0]
  fresh = client()
  fresh.update(other, version)
  assert after == fresh.generate(ask)[0] != before
  assert (before.version, after.version) == (7, version)


def test_a_request_that_does_not_fit_leaves_the_others_alone():
  ask = lambda **k: GenRequest(**dict(messages=(Message('user', 'a'),), max_tokens=4, seed=1) | k)
  found = client().generate([ask(), ask(token_ids=(3,) * 200), ask(max_tokens=99),
                             ask(temperature=0.0, n=2), ask(temperature=-1.0), ask(n=0),
                             ask(stop=('',)), ask(messages=()), ask(tools=tuple(SPECS)), ask()])
  reasons = ['', '200 tokens and 4 new ones are more than', 'max_tokens must lie in 1..12',
             'temperature 0 draws 2 equal', 'temperature 0 draws 2 equal', 'temperature must be',
             'n must be at least 1', 'stop strings must not be empty', 'no messages', 'tools:', '']
  for completion, reason in zip(found, reasons, strict=True):
    assert (completion.finish == 'error') == bool(reason) and reason in completion.error
  assert found[0].token_ids == found[-1].token_ids


@pytest.mark.parametrize('reply, limits, status', [
  ('<calculator>1</calculator>', {}, Status.MAX_TURNS),
  ('<calculator>nope</calculator>', {}, Status.MAX_TURNS),  # a tool that reports is no error
  ('<calculator>1</calculator>', dict(max_turns=1), Status.MAX_TURNS),
  ('no call', dict(wall_s=1e-9), Status.TIMEOUT), ('no call', {}, Status.FINISHED)])
def test_limits_end_in_their_status(reply, limits, status):
  found = play(scripted(reply), limits=dataclasses.replace(LIMITS, **limits))
  assert {e.status for e in found} == {status}


def test_calls_that_no_tool_answers_end_an_episode():
  agent = react.tool_agent(SPECS, 'hermes')
  for reply in ('<tool_call>{"name": "no", "arguments": {}}</tool_call>',
                '<tool_call>not json</tool_call>',
                '<tool_call>{"name": "calculator", "arguments": {"x": 1}}</tool_call>'):
    found = play(scripted(reply), questions(1), agent)[0]
    assert (found.status, found.turns) == (Status.INVALID_OUTPUT, 3), reply
    said = [m.content for n in found.traces[0].nodes for m in n.messages if m.role == 'tool']
    assert len(said) == 2 and all('error' in s for s in said)


def test_tokens_of_all_turns_are_bounded():
  model = Writes(client(), '<calculator>1+1</calculator>', '<calculator>10**30</calculator>')
  found = play(model, questions(1), limits=dataclasses.replace(LIMITS, max_tokens=70))[0]
  row, = traces.rows(found.traces[0])
  assert found.status == Status.MAX_TOKENS and len(row.tokens) - row.start <= 70
  assert row.loss_mask[-1]  # an observation that leaves no room is not in the row
  long = [api.Task('q', dict(messages=(Message('user', 'x' * 50),)))]
  found = play(client(), long, limits=dataclasses.replace(LIMITS, max_prompt_tokens=40))[0]
  assert found.status == Status.MODEL_ERROR and '51 tokens' in found.info['reason']
  assert traces.rows(found.traces[0]) == []


def test_a_model_that_fails_is_a_model_error():
  class Fails:
    capabilities = frozenset()

    def generate(self, requests):
      return [Completion('', 'error', error='HTTP 500') if 'q1' in str(r) or '1+1' in str(r)
              else Completion('fine', 'stop') for r in requests]

  found = play(Fails())
  assert [e.status for e in found] == [Status.FINISHED, Status.MODEL_ERROR, Status.FINISHED]
  assert found[1].info['reason'] == 'HTTP 500'


def test_households_are_won_by_their_expert_through_the_loop():
  """An environment, its reward and its progress; the model says what the expert says."""
  tasks = [household.make('train', i, difficulty=1) for i in range(3)]
  plans = {t.uid: household.expert(*household.start(t)) for t in tasks}
  opening = {}
  for t in tasks:
    env = household.HouseholdEnv()
    opening[env.reset(t, 0).text] = t.uid

  def reply(request):
    uid = opening[request.messages[0].content]
    return plans[uid][sum(m.role == 'assistant' for m in request.messages)]

  found = loop.rollout(tasks, react.env_agent(), dict(policy=llm.ScriptedClient(reply)),
                       limits=loop.Limits(max_turns=40), env=household.HouseholdEnv)
  assert {(e.status, e.reward > 0, e.progress) for e in found} == {(Status.SUCCEEDED, True, 1.0)}
  assert [e.turns for e in found] == [len(plans[t.uid]) for t in tasks]
  lost = loop.rollout(tasks, react.env_agent(), dict(policy=scripted('look')),
                      limits=loop.Limits(max_turns=3), env=household.HouseholdEnv)
  assert {(e.status, e.reward) for e in lost} == {(Status.MAX_TURNS, 0.0)}


class Broken:
  """Hangs, raises or ends, as its task says."""

  def reset(self, task, seed):
    self.how = task.args['how']
    return api.Observation('go')

  def step(self, action):
    if self.how == 'hang':
      time.sleep(3)
    if self.how == 'raise':
      raise RuntimeError('broken')
    return api.StepResult(api.Observation('end'), 1.0, True, 1.0)

  def close(self):
    pass


def test_a_hanging_environment_is_nobodys_fault():
  tasks = [api.Task(how, dict(how=how)) for how in ('fine', 'hang', 'raise', 'good')]
  found = loop.rollout(tasks, react.env_agent(), dict(policy=scripted('act')), limits=LIMITS,
                       env=Broken, step_s=0.3)
  assert [e.status for e in found] == [Status.SUCCEEDED, Status.ENV_ERROR, Status.ENV_ERROR,
                                       Status.SUCCEEDED]
  assert found[1].info['reason'] == 'timeout' and 'broken' in found[2].info['reason']


def test_an_episode_file_resumes(tmp_path):
  path = str(tmp_path / 'episodes.jsonl')
  whole = play(client(), group_size=2)
  asked = []

  class Counts(Writes):
    def generate(self, requests):
      asked.extend(requests)
      if len(asked) > 4:
        raise KeyboardInterrupt
      return super().generate(requests)

  with pytest.raises(KeyboardInterrupt):
    play(Counts(client()), group_size=2, path=path, chunk=2)
  kept = loop.read(path)
  assert 0 < len(kept) < 6
  with open(path, 'a', encoding='utf-8') as file:
    file.write('{"task": "q2", "rep')  # a line that was cut
  done = play(client(), group_size=2, path=path, chunk=2)
  assert done == whole and list(loop.read(path).values()) == whole
  assert play(None, group_size=2, path=path) == whole  # nothing is asked again


def test_a_rewritten_history_is_a_row_of_its_own_and_nothing_is_trained_twice():
  recorder = traces.Recorder('policy', client(), True)
  user, other = Message('user', 'a?'), Message('user', 'b?')

  def say(*messages, ids):
    recorder.ask(messages, turn=0, segment='act')
    return recorder.answer(Completion(TOKENIZER.decode(ids), 'stop', (*ids, TOKENIZER.eos_id),
                                      (-1.0,) * (len(ids) + 1)))

  first = say(user, ids=(10, 11))
  say(user, first, other, ids=(12,))
  say(user, first, Message('user', 'c?'), ids=(13,))  # a fork behind the first answer
  say(Message('user', 'summary'), ids=(14,))  # a history of its own
  rows = traces.rows(recorder.trace())
  assert [int(r.loss_mask.sum()) for r in rows] == [5, 2, 2]
  assert [TOKENIZER.decode(r.tokens, skip_special=False).count('a?') for r in rows] == [1, 1, 0]
  packed = traces.pack([rows[:2], rows[2:], []], size=24, count=6, status=[0, 1, 0],
                       reward=[1.0, 0.5, 0.0], group_id=[4, 5, 6], kind=[0] * 3,
                       question_id=[1, 2, 3], first_traj=8)
  assert packed.traj_id[:4].tolist() == [8, 8, 9, 10] and packed.valid.tolist() == [True] * 3 + [
    False] * 3
  assert packed.traj_tokens[:4].tolist() == [7, 7, 2, 0]
  for i, row in enumerate(rows):  # packing and taking apart is the identity
    inside = packed.segment_ids[i] > 0
    for name, array in (('tokens', packed.tokens), ('loss_mask', packed.loss_mask),
                        ('logp', packed.behavior_logp), ('turn', packed.turn_id)):
      np.testing.assert_array_equal(array[i][inside], getattr(row, name))
      assert not array[i][~inside].any()


@pytest.mark.parametrize('change, part', [
  (dict(logprobs=()), r'2 tokens, 2 mask entries and 0 log-probs'),
  (dict(sampled=False), 'was not sampled, but is in the loss')])
def test_broken_nodes_are_refused(change, part):
  nodes = (Node(None, (), (1,), (False,), (0.0,)),
           Node(0, (), (2, 3), (True, True), (-1.0, -1.0), sampled=True),
           dataclasses.replace(Node(1, (), (2, 3), (True, True), (-1.0, -1.0), sampled=True),
                               **change))
  with pytest.raises(ValueError, match=part):
    traces.rows(Trace(nodes))


def test_rows_that_do_not_fit_are_refused():
  row = traces.rows(Trace((Node(None, (), (1,), (False,), (0.0,)),
                           Node(0, (), (2,), (True,), (-1.0,), sampled=True))))
  facts = dict(status=[0], reward=[0.0], group_id=[0], kind=[0], question_id=[0])
  with pytest.raises(ValueError, match='2 tokens does not fit into size = 1'):
    traces.pack([row], size=1, count=1, **facts)
  with pytest.raises(ValueError, match='2 rows do not fit into count = 1'):
    traces.pack([row * 2], size=4, count=1, **facts)


@pytest.mark.parametrize('template', ['plain', 'chatml'])
def test_a_turn_is_the_tail_of_the_whole_chat(template):
  special = (*tokenizer.SPECIALS, '<|im_start|>', '<|im_end|>')
  own = tokenizer.CharTokenizer(specials=special)
  chat = [Message('user', 'one'), Message('assistant', 'two')]
  new = [Message('tool', 'three <|eos|>'), Message('user', 'four')]
  whole = templates.render(own, chat + new, template)
  head = templates.render(own, chat[:1], template) + own.encode('two') + [
    templates.stop_id(own, template)]
  assert head + templates.render_turn(own, new, template) == whole


def test_unknown_roles_and_missing_environments_are_named():
  with pytest.raises(ValueError, match=r"role 'policy' has no client, there are \['judge'\]"):
    loop.rollout(questions(1), AGENT, dict(judge=scripted('x')), limits=LIMITS)
  with pytest.raises(ValueError, match='no environment was given'):
    loop.rollout([api.Task('t', dict(messages=()))], loop.Agent(
      lambda t, o: 0, lambda s: loop.Act('x'), lambda s, e: s), {}, limits=LIMITS)
  with pytest.raises(ValueError, match='max_turns must be above 0, got 0'):
    loop.Limits(max_turns=0)
  with pytest.raises(ValueError, match='every uid must occur once'):
    play(scripted('x'), questions(1) * 2)


def test_tools_of_several_episodes_run_side_by_side():
  def slow(arguments, ctx):
    time.sleep(0.4)
    return tools_lib.ToolResult('done')

  box = tools_lib.toolbox(tools_lib.Tool(CALCULATOR['calculator'].spec, slow))
  begin = time.monotonic()
  found = loop.rollout(questions(8), AGENT, dict(policy=scripted(
    '<calculator>1</calculator>', 'ok')), limits=LIMITS, tools=box)
  assert time.monotonic() - begin < 8 * 0.4 and {e.status for e in found} == {Status.FINISHED}


class Mute(Exception):
  def __str__(self):
    raise RuntimeError('no text')


class Odd:
  """Task 'q0' plays well; the others break the protocol, each in its own way."""

  def reset(self, task, seed):
    self.uid = task.uid
    return api.Observation('go')

  def step(self, action):
    if self.uid == 'q3':
      raise Mute()
    good = api.StepResult(api.Observation('over'), np.float32(1.0), True)
    return {'q0': good, 'q1': None, 'q2': dataclasses.replace(good, reward='much')}[self.uid]

  def close(self):
    pass


def test_an_environment_that_breaks_its_protocol_harms_no_other(tmp_path):
  path = str(tmp_path / 'episodes.jsonl')
  model = scripted('go')
  play_odd = lambda: loop.rollout(questions(4), react.env_agent(), dict(policy=model),
                                  limits=LIMITS, env=Odd, path=path)
  found = play_odd()
  assert [e.status for e in found] == [Status.SUCCEEDED] + [Status.ENV_ERROR] * 3
  assert 'step returned None' in found[1].info['reason'] and 'Mute' in found[3].info['reason']
  assert loop.read(path) == {(e.task, e.repetition): e for e in found}
  asked = len(model.requests) if hasattr(model, 'requests') else None
  assert play_odd()[0] == found[0] and asked is None  # faults are tried again, the rest is kept
  assert len((tmp_path / 'episodes.jsonl').read_text().splitlines()) == 4 + 3


def test_a_file_that_cannot_be_written_and_bad_counts_cost_no_episode(tmp_path):
  model = Writes(client())
  with pytest.raises(FileNotFoundError):
    play(model, path=str(tmp_path / 'none' / 'episodes.jsonl'))
  for name, value in (('group_size', 0), ('chunk', -1)):
    with pytest.raises(ValueError, match=f'{name} must be at least [01], got {value}'):
      play(model, **{name: value})
  assert not model.requests


def test_limits_count_the_tokens_of_each_role():
  """A role without tokens speaks first; the policy is bounded as if alone."""
  first = lambda state: loop.Call(
    (Message('user', 'a question of some length'),), 'thinker' if state == 0 else 'policy')
  agent = loop.Agent(lambda task, _: 0, lambda s: loop.Done() if s == 2 else first(s),
                     lambda s, _: s + 1)
  for limits, status in ((dict(max_tokens=30), Status.FINISHED),
                         (dict(max_prompt_tokens=20), Status.MODEL_ERROR)):
    model = Writes(client(), 'yes')
    found = loop.rollout(questions(1), agent, dict(policy=model, thinker=scripted('hm')),
                         limits=dataclasses.replace(LIMITS, **limits))[0]
    assert found.status == status, found


def test_an_answer_that_a_stop_string_ended_is_closed_before_the_next_turn():
  recorder = traces.Recorder('policy', client(), True)
  said = (Message('user', '1+1?'),)
  recorder.ask(said, turn=0, segment='act')
  ids = tuple(TOKENIZER.encode('2!'))
  message = recorder.answer(llm.Completion('2', 'stop', ids, (0.0,) * 2))
  shown = recorder.ask((*said, message, Message('user', 'more')), turn=1, segment='act')
  assert TOKENIZER.decode(shown, skip_special=False) == '1+1?<|sep|>2!<|eos|>more<|sep|>'
  row, = [r for r in traces.rows(recorder.trace())]
  assert row.loss_mask.sum() == 2


def test_part_of_a_goal_is_no_success():
  half = api.StepResult(api.Observation('over'), 0.5, True, 0.5)

  class Half(Odd):
    def step(self, action):
      return half

  found = loop.rollout(questions(1), react.env_agent(), dict(policy=scripted('go')), limits=LIMITS,
                       env=Half)[0]
  assert found.status == Status.FAILED and found.reward == 0.5


def test_logits_that_are_not_finite_fail_their_episode_alone():
  broken = dataclasses.replace(params(), embed=params().embed.at[TOKENIZER.encode('7')[0]].set(
    np.nan))
  config = dataclasses.replace(CONFIG, tied=False)
  broken = dataclasses.replace(models.init(config, jax.random.key(0)), embed=broken.embed)
  model = policy.PolicyClient(
    config, broken, TOKENIZER, 'plain', key=jax.random.key(0), max_new_tokens=1,
    shape=conversations.Shape(slots=2, context=96, steps=4, chunks=(8, 32)))
  asked = [llm.GenRequest((Message('user', text),), max_tokens=1, seed=1) 
           for text in ('1+7', '1+1')]
  bad, good = model.generate(asked)
  assert (bad.finish, bad.error) == ('error', policy.NOT_FINITE) and good.finish in (
    'stop', 'length')
  odd, fine = model.generate([dataclasses.replace(asked[1], temperature=None), asked[1]])
  assert odd.finish == 'error' and fine == good
