"""Several turns in training: rows, masks, rewards and metrics are those of the episodes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from experiments.train import train
from ml_collections_configs import grpo
from zppo_jax.agents import builtin_tools, llm, loop, policy, react, tools, traces
from zppo_jax.agents.records import Episode, Node, Status, Trace
from zppo_jax.core import types
from zppo_jax.core.errors import UserError
from zppo_jax.data.tasks import sources
from zppo_jax.envs import api as envs_api
from zppo_jax.envs import household, source
from zppo_jax.launch import validate
from zppo_jax.methods import api
from zppo_jax.sampling import decode, score
from zppo_jax.train import context, episodes, observe
from zppo_jax.train import setup as setup_lib

BOX = tools.toolbox(builtin_tools.calculator())
AGENT = react.tool_agent([t.spec for t in BOX.values()], 'xml_tags', system='')
PROMPT, ROOM = 8, 192


@pytest.fixture(scope='module')
def questions():
  source = sources.build_source(dict(name='arithmetic', digits=1, terms=2, size=64, tool=True))
  return setup_lib.Questions(source, tiny.tokenizer(), 'plain', parser='xml_tags')


def step_context(questions, agent=AGENT, **changes):
  """A random policy that ends its answers now and then; most call no tool."""
  method = tiny.table.build('grpo', tiny.overrides('grpo'))
  setup = dataclasses.replace(
    tiny.setup(method, tiny.mesh()), questions=questions, prompt_tokens=PROMPT,
    episodes=episodes.Episodes(agent, BOX, max_turns=3, turn_tokens=56), **changes)
  setup = dataclasses.replace(setup, sampling=dataclasses.replace(
    setup.sampling, max_new_tokens=ROOM))
  return context.StepContext(setup, tiny.weights(1), step=0, version=4)


def asks_twice():
  """An agent that asks its model again, whatever it says; its 'tool' answers with numbers."""
  return dataclasses.replace(
    AGENT, observe=lambda state, event: _again(state, event), next=lambda state: state.move)


def _again(state, event):
  if isinstance(event, tools.Answers):
    return react.State((*state.messages, *event.messages), loop.Call(
      (*state.messages, *event.messages)))
  messages = (*state.messages, types.Message('assistant', event.text))
  return react.State(messages, loop.UseTools((types.ToolCall(
    'call_0', 'calculator', {'expression': f'{len(event.text)}*7'}),)))


def test_rows_of_a_draw_are_whole_episodes_and_scores_agree(questions):
  ctx = step_context(questions, asks_twice())
  groups = [api.Group(q) for q in (3, 5, 3)]
  drawn = ctx.draw(groups, capacity=4, first_id=20)
  r = jax.tree.map(np.asarray, drawn.rollout)
  assert r.tokens.shape == (16, PROMPT + ROOM)
  assert r.group_id.tolist() == sum(([20 + g] * 4 for g in range(4)), [])
  assert r.traj_id.tolist() == list(range(80, 96)) and r.valid.tolist() == [True] * 12 + [False] * 4
  assert r.question_id[:12].tolist() == [3] * 4 + [5] * 4 + [3] * 4
  assert set(r.version[r.loss_mask]) == {4} and not r.behavior_logp[~r.loss_mask].any()
  turns = [set(t[m].tolist()) for t, m in zip(r.turn_id, r.loss_mask)]
  assert {1, 2, 3} in turns and set(r.status[:12]) <= {types.TRUNCATED, types.OUT_OF_TURNS}
  others = (r.turn_id > 1) & ~r.loss_mask
  assert others.any(axis=1)[:12].sum() > 3, 'no tool answered'
  scored = score.score(tiny.model(), tiny.weights(1), drawn.rollout, window=ROOM, chunk=8, group=4)
  np.testing.assert_allclose(scored.logp, r.behavior_logp, atol=1e-4)
  np.testing.assert_array_equal(r.traj_tokens, r.loss_mask.sum(1))
  found = ctx.metrics()
  assert found['episode/tool_calls'] > 0.5 and found['episode/tool_error_frac'] == 0
  shown = observe.readable([drawn], ctx, 12)
  turns = [row['turns'] for row in shown if 'turns' in row]
  assert turns and all([t['by'] for t in row] == (['policy', 'environment'] * 3)[:len(row)]
                       for row in turns)
  assert turns[0][1]['text'] == str(7 * len(turns[0][0]['text']))
  again = step_context(questions, asks_twice(), slots=3).draw(groups, capacity=4, first_id=20)
  np.testing.assert_array_equal(again.rollout.tokens, r.tokens)


def test_a_worked_dialogue_is_the_row_of_the_episode_that_says_it(questions):
  """Supervised rows and rollouts are the same tokens with the same mask."""
  example = questions.example(7)
  replies = [react.write(m, 'xml_tags') for m in example.dialogue if m.role == 'assistant']

  class Client:
    capabilities = frozenset({'tokens', 'train'})
    open = staticmethod(questions.render)
    stop_id = questions.stop_id

    def turn(self, messages):
      return setup_lib.templates.render_turn(questions.tokenizer, messages, 'plain')

    def generate(self, requests):
      turn = sum(m.role == 'assistant' for m in requests[0].messages)
      ids = (*questions.tokenizer.encode(replies[turn]), questions.stop_id)
      return [llm.Completion(replies[turn], 'stop', ids, (0.0,) * len(ids))]

  task = envs_api.Task('q', dict(messages=example.messages))
  found = loop.rollout([task], AGENT, dict(policy=Client()), tools=BOX, limits=loop.Limits())[0]
  row, = traces.rows(found.traces[0])
  ctx = step_context(questions)
  ids, others = ctx.worked(7)
  given = ctx.draw([api.Group(7, response=ids, others_said=others)], capacity=2, group_size=1)
  inside = np.asarray(given.rollout.segment_ids[0]) > 0
  np.testing.assert_array_equal(np.asarray(given.rollout.tokens[0])[inside], row.tokens)
  np.testing.assert_array_equal(np.asarray(given.rollout.loss_mask[0])[inside], row.loss_mask)
  assert found.text == f'\\boxed{{{example.answer}}}' and any(others)
  assert not np.asarray(given.rollout.loss_mask[1]).any()


def node(parent, size, sampled):
  return Node(parent, (), (5,) * size, (sampled,) * size, (-0.5 * sampled,) * size, sampled=sampled)


def test_a_fault_takes_its_row_out_of_the_group():
  good = Trace((node(None, 3, False), node(0, 2, True)))
  facts = dict(size=8, group_size=2, first_id=0, kind=[0, 0], question_id=[1, -1])
  found = [Episode('a', 0, Status.SUCCEEDED, (good,), reward=1.0),
           Episode('a', 1, Status.ENV_ERROR, (good,))]
  packed = episodes.pack(found, **facts)
  assert packed.reward[0] == 1 and np.isnan(packed.reward[1])
  assert packed.status.tolist() == [types.FINISHED, types.ENV_FAILURE, 0, 0]
  drawn = api.Drawn(jax.tree.map(jax.numpy.asarray, packed), (api.Group(1), None), 2, ('',) * 4,
                    (None,) * 4, packed.reward)
  shown = observe.rollout_metrics([drawn])
  assert shown['reward/mean'] == 1 and all(np.isfinite(v) for v in shown.values())
  fork = Trace((node(None, 3, False), node(0, 2, True), node(0, 2, True)))
  with pytest.raises(ValueError, match='rewrites its history'):
    episodes.pack([dataclasses.replace(found[0], traces=(fork,))], **facts)


def test_a_prompt_above_its_bucket_is_named(questions):
  ctx = step_context(dataclasses.replace(questions, system='a long system text'))
  with pytest.raises(UserError, match='the prompt has 2. tokens, max_prompt_tokens is 8'):
    ctx.draw([api.Group(1)], capacity=1)
  with pytest.raises(UserError, match='no forced prefixes'):
    step_context(questions).draw([api.Group(1, forced=(5,))], capacity=1, forced_tokens=1)


def test_an_environment_asks_acts_and_rewards():
  own = source.EnvSource('household', 'train', 4, dict(difficulty=1))
  held_out = source.EnvSource('household', 'validation', 4, dict(difficulty=1))
  asked = setup_lib.Questions(own, tiny.tokenizer(), 'plain')
  example = own[1]
  env = household.HouseholdEnv()
  assert env.reset(envs_api.Task('t', example.meta), 0).text == example.messages[0].content
  for say, told in zip(example.dialogue[::2], [*example.dialogue[1::2], None]):
    result = env.step(say.content)
    assert result.done == (told is None)
    assert told is None or result.observation.text == told.content
  assert result.reward == 1 and not {own[i].uid for i in range(4)} & {
    held_out[i].uid for i in range(4)}
  bucket = -(-max(len(asked.plain_ids(i)) for i in range(4)) // 64) * 64
  ctx = step_context(asked, react.env_agent())
  ctx = context.StepContext(dataclasses.replace(
    ctx._setup, prompt_tokens=bucket, episodes=episodes.Episodes(
      react.env_agent(), {}, 3, 56, household.HouseholdEnv)), tiny.weights(1), step=0, version=0)
  drawn = ctx.draw([api.Group(1), api.Group(2)], capacity=2)
  assert not drawn.reward.any() and drawn.answers == (None,) * 8  # nobody graded the texts
  said = [asked.tokenizer.decode(t[(u > 0) & ~m]) for t, u, m in zip(*map(np.asarray, (
    drawn.rollout.tokens, drawn.rollout.turn_id, drawn.rollout.loss_mask)))]
  assert any('Nothing happens' in s for s in said), said


def tool_config(get, **changes):
  c = get('tiny')
  with c.unlocked():
    c.data.tasks = dict(sums=dict(name='arithmetic', digits=1, terms=2, tool=True, weight=1.0))
  c.agent.update(tools=('calculator',), turn_tokens=24)
  c.rollout.max_new_tokens = 64
  c.eval.num_questions, c.log.progress = 8, False
  c.method.num_new = 8
  c.update(changes)
  return c


def test_sft_trains_on_dialogues_where_there_are_some(questions):
  method = tiny.table.build('sft', dict(num_new=2, label_noise=0.0))
  ctx = step_context(questions)
  _, groups = method.plan((), np.asarray([1, 2]), ctx)
  assert [(g.response, g.others_said) for g in groups] == [ctx.worked(1), ctx.worked(2)]
  plain = step_context(tiny.questions())
  _, groups = method.plan((), np.asarray([1, 2]), plain)
  assert groups[0].response == plain.encode(tiny.source()[1].solution)
  assert groups[0].others_said == ()


def test_grpo_over_turns_from_a_config(tmp_path):
  """Through the main entry; sampler against scorer."""
  train(tool_config(grpo.get_config, num_steps=1), str(tmp_path), report_paths=False)
  with open(tmp_path / 'metrics.jsonl', encoding='utf-8') as file:
    rows = [json.loads(line) for line in file]
  assert [r['step'] for r in rows] == [0, 1]
  assert rows[1]['mismatch/abs_max'] < 1e-4 and rows[1]['episode/turns'] >= 1


@pytest.mark.parametrize('section, values, part', [
  ('agent', dict(tools=('calculater',)), "did you mean 'calculator'"),
  ('agent', dict(tools=('python',) * 2), 'names a tool twice'),
  ('agent', dict(parser='hermess'), "did you mean 'hermes'"),
  ('agent', dict(turn_tokens=65), 'turn_tokens: 65 is more than rollout.max_new_tokens = 64'),
  ('agent', dict(max_turns=0), 'agent.max_turns'),
  ('agent', dict(parser='code_block'), 'agent.parser'),
  ('agent', dict(env='houshold'), "did you mean 'household'"),
  ('agent', dict(env='household'), 'has no tools: leave them out'),
  ('agent', dict(tools=(), env='household', env_args=dict(difficulty=9)), 'agent.env_args'),
  ('agent', dict(tools=(), env='shop', env_args=dict(dificulty=1)), 'dificulty')])
def test_bad_sections_are_named(section, values, part):
  c = tool_config(grpo.get_config)
  c[section].update(values)
  assert any(part in f'{p.field}: {p.message}' for p in validate.problems(c, num_devices=1)), [
    str(p) for p in validate.problems(c, num_devices=1)]


def test_one_episode_without_finite_logits_is_a_fault_and_all_are_an_error(monkeypatch):
  fault = Episode('a', 0, Status.MODEL_ERROR, (), info=dict(reason=policy.NOT_FINITE))
  fine = Episode('a', 1, Status.SUCCEEDED, (), reward=1.0)
  model, found = tiny.model(), [fault, fine]
  monkeypatch.setattr(episodes.loop, 'rollout', lambda *a, limits, **k: found)
  run = lambda: episodes.run(
    episodes.Episodes(AGENT, BOX, 4, 8), [], config=model, params=None,
    tokenizer=tiny.tokenizer(), template='plain', settings=decode.Settings(8, (2,)),
    prompt_tokens=8, slots=2, key=jax.random.key(0), version=0)
  assert run() == found
  found.pop()
  with pytest.raises(UserError, match='the logits of the policy are not finite'):
    run()
