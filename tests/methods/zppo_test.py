"""ZPPO: the worked example of a step, its exact truths and its bad inputs (arXiv:2606.18216)."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fake_context import FakeContext, make_drawn, make_rollout

from zppo_jax.core import trees, types
from zppo_jax.core.errors import RewardError, UserError
from zppo_jax.data import templates
from zppo_jax.methods import api, guidance, second_phase, table, zppo
from zppo_jax.methods import reformulate as text
from zppo_jax.models import decoder
from zppo_jax.models import params as params_lib
from zppo_jax.replay import prompts as prompt_buffer
from zppo_jax.train import context, observe, prepare
from zppo_jax.train import run as run_lib

BCQ, NCQ = zppo.BCQ, zppo.NCQ
RIGHT_OF_8 = {0: 0, 1: 1, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7, 7: 8, 8: 0, 9: 5}  # the worked example


def small(**changes) -> zppo.Config:
  return zppo.Config(**dict(num_new=8, buffer_capacity=16, iterations=1, compress='tail',
                            teacher_chunk=4) | changes)


def rewards_of(question: int, right=RIGHT_OF_8):
  return [1.0] * right[question] + [0.0] * (8 - right[question])


def joined(parts) -> types.Rollout:
  """All parts as the loop hands them to absorb."""
  return prepare.join([p.rollout for p in parts], max(p.rollout.tokens.shape[1] for p in parts))


def example_step(config: zppo.Config, teacher_right):
  """The worked example: (context, parts, buffer before, buffer after)."""
  method, ctx = zppo.build(config), FakeContext(teacher_right=frozenset(teacher_right))
  buffer = prompt_buffer.update(
    method.init(jax.random.key(0)), jnp.asarray([8, 9]), jnp.asarray([0.0, 0.125]),
    jnp.ones(2, bool), tau=config.tau)
  buffer, groups = method.plan(buffer, np.arange(8, dtype=np.int32), ctx)
  drawn = make_drawn(groups, [rewards_of(g.question) for g in groups], capacity=method.capacity)
  buffer, parts = method.explore(buffer, drawn, ctx)
  return ctx, parts, buffer, method.absorb(buffer, joined(parts))


def instances(parts):
  return [(g.kind, g.question) for g in parts[1].groups if g is not None]


@pytest.mark.parametrize('rho_aug,teacher_right,expected', [
  (0.25, {0}, [(BCQ, 0), (NCQ, 0)]),
  (0.375, {0}, [(BCQ, 0), (NCQ, 0), (NCQ, 8)]),
  (0.375, {0, 8}, [(BCQ, 0), (NCQ, 0), (BCQ, 8)]),
  (0.125, {0}, [(BCQ, 0)]),  # a lone last slot goes to BCQ
  (0.25, set(), [(NCQ, 0), (NCQ, 8)]),
  (1.0, {0, 1, 2, 8}, [(k, q) for q in (0, 8, 1, 2) for k in (BCQ, NCQ)]),
])
def test_worked_example_of_a_step(rho_aug, teacher_right, expected):
  ctx, parts, _, _ = example_step(small(rho_aug=rho_aug), teacher_right)
  assert instances(parts) == expected
  cap = int(rho_aug * 8)
  assert len(parts[1].groups) == cap  # static slots
  assert set(ctx.asked()) == set([0, 8, 1, 2][:cap])  # the teacher sees candidates only
  assert ctx.draws[-1][1]['first_id'] == 10 and ctx.draws[-1][1]['reformulated']


@pytest.mark.parametrize('changes,teacher_right,expected,asked', [
  # Without NCQ the pre-cap looks at the questions that the teacher solves, among all hard ones.
  (dict(use_ncq=False), {1, 2}, [(BCQ, 1), (BCQ, 2)], {0, 1, 2, 8}),
  (dict(use_ncq=False), set(), [], {0, 1, 2, 8}),
  (dict(use_bcq=False), {0}, [(NCQ, 0), (NCQ, 8)], set()),
])
def test_worked_example_with_one_kind(changes, teacher_right, expected, asked):
  ctx, parts, _, _ = example_step(small(rho_aug=0.25, **changes), teacher_right)
  assert instances(parts) == expected and set(ctx.asked()) == asked


def test_worked_example_of_the_buffer():
  _, parts, before, after = example_step(small(rho_aug=0.25), {0})
  assert [g.question for g in parts[0].groups[:8]] == list(range(8))
  assert sorted(g.question for g in parts[0].groups[8:]) == [8, 9]
  assert before.question_id[before.valid].tolist() == [8, 9]
  assert after.question_id[after.valid].tolist() == [8, 0, 1, 2]  # x8 keeps its place, x3 stays out
  np.testing.assert_array_equal(after.entry_acc[after.valid], [0, 0, 0.125, 0.375])
  assert after.graduated.tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0]  # x9, by its entry accuracy
  assert after.visits[after.valid].tolist() == [1, 0, 0, 0]


def test_a_replayed_question_that_is_new_appears_once():
  method, ctx = zppo.build(small()), FakeContext()
  buffer = prompt_buffer.update(method.init(jax.random.key(0)), jnp.asarray([3, 20, 30]),
                                jnp.zeros(3), jnp.ones(3, bool), tau=0.5)
  _, groups = method.plan(buffer, np.arange(8, dtype=np.int32), ctx)
  assert [g.question for g in groups[:8]] == list(range(8))
  assert sorted(g.question for g in groups[8:]) == [20, 30]


def test_buffer_accuracy_is_that_of_plain_rollouts():
  """Truth 10: rewards of BCQ and NCQ rows reach no buffer statistic."""
  config = small(rho_aug=0.25)
  _, parts, before, after = example_step(config, {0})
  solved = dataclasses.replace(parts[1], rollout=dataclasses.replace(
    parts[1].rollout, reward=np.ones_like(parts[1].rollout.reward)))
  other = zppo.build(config).absorb(before, joined([parts[0], solved]))
  jax.tree.map(np.testing.assert_array_equal, other, after)
  plain = dataclasses.replace(parts[0], rollout=dataclasses.replace(
    parts[0].rollout, reward=np.ones_like(parts[0].rollout.reward)))
  graduated = zppo.build(config).absorb(before, joined([plain, parts[1]]))
  assert not graduated.valid.any()


def test_a_teacher_row_is_no_success_of_the_student():
  """The response that the teacher wrote into a group of eight does not graduate a question."""
  config = small(use_bcq=False, use_ncq=False, guide='teacher_response')
  method, ctx = zppo.build(config), FakeContext(teacher_right=frozenset({1}))
  buffer, groups = method.plan(method.init(jax.random.key(0)), np.arange(8, dtype=np.int32), ctx)
  right = {q: 3 if q == 1 else 8 for q in range(8)}
  drawn = make_drawn(groups, [rewards_of(g.question, right) for g in groups],
                     capacity=method.capacity)
  buffer, parts = method.explore(buffer, drawn, ctx)
  assert parts[0].reward[8:16].sum() == 4  # three of the student, one of the teacher
  after = method.absorb(buffer, joined(parts))
  assert after.question_id[after.valid].tolist() == [1]
  assert after.entry_acc[0] == pytest.approx(3 / 8)


def _brute_force(accuracy, right, cap, use_bcq, use_ncq):
  """Steps 2 to 5 as the algorithm's listing walks them."""
  hard = sorted((s for s in range(len(accuracy)) if accuracy[s] < 0.5),
                key=lambda s: (accuracy[s], s))
  if not use_ncq:
    hard = [s for s in hard if s in right]
  found = []
  for slot in hard[:cap]:
    for kind, on in ((BCQ, use_bcq and slot in right), (NCQ, use_ncq)):
      if on:
        if len(found) == cap:
          return found
        found.append((kind, slot))
  return found


def test_instances_follow_the_listing_on_random_steps():
  """Truth 6: at most C instances, hardest questions first, BCQ before NCQ."""
  generator = np.random.default_rng(0)
  for _ in range(60):
    cap, use_bcq, use_ncq = generator.integers(1, 9), *[(True, True), (True, False), (False, True)][
      generator.integers(3)]
    config = small(rho_aug=float(cap) / 8, use_bcq=use_bcq, use_ncq=use_ncq)
    rewards = generator.random((8, 8)) < generator.random((8, 1))
    drawn = make_drawn([api.Group(q) for q in range(8)], rewards.astype(float))
    right = {s: ['t'] for s in range(8) if generator.random() < 0.5}
    hard = second_phase.hard_slots(drawn, config.tau)
    chosen = zppo.choose_instances(config, drawn, right, hard, FakeContext())
    found = [(x.kind, x.slot) for x in chosen]
    assert found == _brute_force(rewards.mean(1), right, cap, use_bcq, use_ncq)
    assert len(found) <= cap
    for instance in chosen:
      if instance.kind == NCQ:  # all K wrong rollouts, in order
        wrong = np.flatnonzero(~rewards[instance.slot])
        assert instance.traces == tuple(drawn.texts[instance.slot * 8 + i] for i in wrong)
        assert instance.answers == tuple(drawn.answers[instance.slot * 8 + i] for i in wrong)
      else:  # one right answer of the teacher and one wrong rollout
        wrong = {drawn.texts[instance.slot * 8 + i]
                 for i in np.flatnonzero(~rewards[instance.slot])}
        assert len(instance.traces) == 2 and instance.traces[0] in right[instance.slot]
        assert instance.traces[1] in wrong


def credit_advantage(config, rewards, group_ids):
  rewards = np.asarray(rewards, np.float32)
  rollout = make_rollout([api.Group(q) for q in range(3)], rewards, capacity=3, group_size=4)
  rollout = dataclasses.replace(rollout, group_id=jnp.asarray(group_ids, jnp.int32))
  scores = types.Scores(minibatch=jnp.zeros(12, jnp.int32))
  _, signal = zppo.build(config).credit((), rollout, scores)
  return np.asarray(signal.advantage)


def test_groups_of_one_question_share_no_baseline():
  """Truth 5: plain, BCQ and NCQ groups of one question; permuting one leaves the others alone."""
  config = small(norm='none', group_size=4)
  plain, bcq, ncq = [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]
  ids = np.repeat([0, 5, 7], 4)
  before = credit_advantage(config, [*plain, *bcq, *ncq], ids)
  after = credit_advantage(config, [*plain, *bcq[::-1], *ncq], ids)
  np.testing.assert_array_equal(after[[0, 1, 2, 3, 8, 9, 10, 11]],
                                before[[0, 1, 2, 3, 8, 9, 10, 11]])
  np.testing.assert_array_equal(after[4:8], before[4:8][::-1])
  np.testing.assert_allclose(before[:, 2], [.75, -.25, -.25, -.25, .5, .5, -.5, -.5,
                                            -.25, -.25, -.25, .75])
  shared = credit_advantage(config, [*plain, *bcq, *ncq], np.zeros(12))
  assert not np.allclose(shared, before)


def test_norm_scope_is_the_step_or_the_mini_batch():
  """sigma over the groups of the whole step, or over those of each mini-batch alone."""
  rewards = np.asarray([1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0], np.float32)
  rollout = make_rollout([api.Group(q) for q in range(3)], rewards, capacity=3, group_size=4)
  scores = types.Scores(minibatch=jnp.repeat(jnp.arange(3), 4))
  whole = zppo.batch_advantage(small(group_size=4, iterations=3), rollout, scores)
  np.testing.assert_allclose(whole, [1.6036, *[-.5345] * 3, 1.0690, 1.0690, -1.0690, -1.0690,
                                     0, 0, 0, 0], atol=1e-4)
  parts = zppo.batch_advantage(small(group_size=4, iterations=3, norm_scope='minibatch'), rollout,
                               scores)
  np.testing.assert_allclose(parts, [3**.5, *[-3**-.5] * 3, 1, 1, -1, -1, 0, 0, 0, 0], rtol=1e-4)


def _blocks(prompt: str) -> list[str]:
  return re.findall(r'<candidate>(.*?)</candidate>', prompt, re.DOTALL)


def test_bcq_order_is_a_fair_coin_without_labels():
  """Truth 8, over 600 questions of one step: binomial within four standard deviations."""
  ctx, config = FakeContext(), small(num_new=600)
  drawn = make_drawn([api.Group(q) for q in range(600)], [[0.0, 0.0]] * 600)
  chosen = [zppo.Instance(s, BCQ, (f'A{s} \\boxed{{1}}', f'B{s} \\boxed{{2}}')) for s in range(600)]
  groups = zppo.build_groups(config, drawn, chosen, ctx)
  first = 0
  for slot, group in enumerate(groups):
    body = group.messages[-1].content
    blocks = _blocks(body)
    assert sorted(blocks) == [f'A{slot} \\boxed{{1}}', f'B{slot} \\boxed{{2}}']
    frame = body.replace(blocks[0], '').replace(blocks[1], '')
    empty = '<candidate></candidate>'
    assert frame == f'question {slot}\n{text.FULL.bcq}\n{empty}\n{empty}'  # no label anywhere
    first += blocks[0].startswith('A')
  assert abs(first - 300) < 4 * (600 / 4) ** 0.5
  again = zppo.build_groups(config, drawn, chosen, FakeContext(step=1))
  assert [g.messages for g in again] != [g.messages for g in groups]  # a new coin at each visit


def test_ncq_lists_distinct_answers_and_every_trace():
  traces = ['t1', 't2', 't1', 't4', 't5']
  body = text.build_ncq('Q?', traces, ['7', '7.0', None, ' 8 ', '7'])
  assert _blocks(body) == traces
  assert body.startswith(f'Q?\n{text.FULL.ncq}\\boxed{{7}}, \\boxed{{8}}\n')
  nothing = text.build_ncq('Q?', ['t'], [None])
  assert '\\boxed' not in nothing and text.FULL.ncq.strip() not in nothing
  assert _blocks(nothing) == ['t']


@pytest.mark.parametrize('wording', sorted(text.WORDINGS))
@pytest.mark.parametrize('dirty', [
  'a</candidate><candidate>b', '<think>x</think>y', '<thi<think>nk>z', '<<candidate>candidate>w',
  '<hint>h</hint>', '</cand<candidate>idate>v', '{a{b}c}', '[d]',
])
def test_candidates_are_data(dirty, wording):
  """No tag of the prompt survives inside a candidate, an answer or a hint."""
  w = text.WORDINGS[wording]
  rng = np.random.default_rng(0)
  tags = [w.open_tag, w.close_tag, '<think>', '</think>']
  clean = text.build_bcq('Q', 'a', 'b', rng, w)
  body = text.build_bcq('Q', dirty, 'b', rng, w)
  assert [body.count(t) for t in tags] == [clean.count(t) for t in tags]
  hinted = text.build_hint('Q', dirty, w)
  assert hinted.count(w.hint_open) == hinted.count(w.hint_close) == 1 and '<think>' not in hinted
  listed = text.build_ncq('Q', [dirty], [dirty], dataclasses.replace(w, open_tag='<candidate>',
                                                                    close_tag='</candidate>'))
  assert listed.count('<candidate>') == 1 and '<think>' not in listed


def test_candidates_carry_no_special_tokens():
  """A trace that spells a chat token is tokenised as text."""
  tokenizer = tiny.tokenizer()
  body = text.build_ncq('Q', ['end<|eos|><|sep|>'], ['<|eos|>'])
  ids = templates.render(tokenizer, [types.Message('user', body)], 'plain')
  specials = [i for i in ids if i in tokenizer.special.values()]
  plain = templates.render(tokenizer, [types.Message('user', 'Q')], 'plain')
  assert specials == [i for i in plain if i in tokenizer.special.values()]


SOURCE = 'long ' * 30 + '\\boxed{5}'


def compress(sources, writer, max_tokens=20):
  ctx = FakeContext(writer=writer)
  found = guidance.compress('teacher', sources, ctx, max_tokens=max_tokens, wording=text.FULL)
  return found, ctx


def test_compression_restores_a_missing_box():
  found, ctx = compress([SOURCE], lambda p: '<summary>short</summary>')
  assert found == ['short\n\\boxed{5}'] and ctx.counts['compress/violations'] == [0, 1]


def test_compression_reads_the_tags_and_keeps_a_right_box():
  found, ctx = compress([SOURCE], lambda p: 'noise<summary>so \\boxed{5}</summary>noise')
  assert found == ['so \\boxed{5}'] and len(ctx.written) == 1


def test_compression_asks_all_traces_at_once_in_one_way():
  sources = [SOURCE, 'wrong \\boxed{6}', 'no answer']
  _, ctx = compress(sources, lambda p: '<summary>s</summary>', max_tokens=33)
  (prompts, max_tokens, tag), = ctx.written
  assert (max_tokens, tag) == (33, 'compress')
  frames = {p.replace(s, '') for p, s in zip(prompts, sources)}
  assert len(frames) == 1  # nothing in the instruction tells right from wrong


def test_a_changed_answer_is_redone_once_with_the_answer_named():
  def writer(prompt):
    return '\\boxed{5}' if 'answer to copy is \\boxed{5}' in prompt else 'now \\boxed{6}'

  found, ctx = compress([SOURCE], writer)
  assert found == ['\\boxed{5}'] and len(ctx.written) == 2
  assert ctx.counts['compress/violations'] == [1, 1]


def test_an_answer_that_stays_changed_falls_back_to_the_tail():
  """The rewriter may never repair a wrong trace."""
  found, ctx = compress([SOURCE, 'fine \\boxed{1}'],
                        lambda p: 'now \\boxed{6}' if SOURCE in p else '\\boxed{1}')
  assert found == [SOURCE[-20:], '\\boxed{1}']
  assert [len(prompts) for prompts, _, _ in ctx.written] == [2, 1]  # only the bad one again


def test_a_source_without_an_answer_is_kept_without_one():
  source = 'I do not know ' * 5
  found, ctx = compress([source], lambda p: 'summary \\boxed{9}')
  assert found == [source[-20:]]
  assert 'None' not in ctx.written[1][0][0]  # the second call names no answer that is not there
  found, _ = compress([source], lambda p: 'summary')
  assert found == ['summary']


def test_the_tail_restores_an_answer_that_the_cut_lost():
  ctx = FakeContext()
  assert guidance.tail('\\boxed{5} and more words', ctx, 10) == 'more words\n\\boxed{5}'
  assert guidance.tail('words \\boxed{5}', ctx, 9) == '\\boxed{5}'


def guided(guide, rewards, *, teacher_right, writer=None, cut=(), **changes):
  """Explore of a guide on groups of four: (context, parts, drawn)."""
  config = small(group_size=4, use_bcq=False, use_ncq=False, use_buffer=False, guide=guide,
                 **changes)
  method = zppo.build(config)
  ctx = FakeContext(teacher_right=frozenset(teacher_right), writer=writer,
                    cut_questions=frozenset(cut))
  drawn = make_drawn([api.Group(q) for q in range(len(rewards))], rewards,
                     capacity=method.capacity)
  return ctx, method.explore((), drawn, ctx)[1], drawn


def test_hints_that_leak_the_answer_are_dropped():
  hints = {0: 'Look at the carry.', 1: 'It is 1 of course.', 2: 'Put \\boxed{x}.',
           3: 'First think.'}

  def writer(prompt):
    return hints[int(re.search(r'<problem>question (\d)', prompt).group(1))]

  ctx, parts, _ = guided('hint', [[0.0] * 4] * 4, teacher_right={0, 1, 2}, writer=writer,
                         rho_aug=1.0)
  kept = [g for g in parts[1].groups if g is not None]
  assert [g.question for g in kept] == [0]  # 3 has no right trace, 1 and 2 leak
  assert kept[0].kind == guidance.HINT
  assert kept[0].messages[-1].content.endswith('<hint>Look at the carry.</hint>')
  assert ctx.counts['hint/leaks'] == [2, 3]
  assert ctx.draws[-1][1]['first_id'] == 8 and ctx.draws[-1][1]['reformulated']


@pytest.mark.parametrize('hint,leaks', [
  ('use 12', True), ('use 120', False), ('\\boxed{', True), ('a' * 25, True), ('x12y', False)])
def test_what_counts_as_a_leak(hint, leaks):
  assert text.leaks_answer(hint, f'{"a" * 25}\n\\boxed{{12}}') == leaks


def test_prefix_forces_forty_percent_of_a_right_trace():
  ctx, parts, _ = guided('prefix', [[0.0] * 4, [1.0] * 4, [0.0] * 4], teacher_right={0, 1},
                         rho_aug=0.5, prefix_tokens=100)
  group, = [g for g in parts[1].groups if g is not None]
  assert (group.question, group.kind) == (0, guidance.PREFIX)
  forced = ctx.decode(group.forced)
  whole = [f'teacher 0.{i} \\boxed{{0}}' for i in range(4)]
  assert any(t.startswith(forced) for t in whole) and len(forced) == int(0.4 * len(whole[0]))
  assert ctx.draws[-1][1]['forced_tokens'] == 100
  ctx, parts, _ = guided('prefix', [[0.0] * 4], teacher_right={0}, rho_aug=0.5, prefix_tokens=3)
  assert len(parts[1].groups[0].forced) == 3


def test_teacher_response_replaces_one_wrong_row():
  rewards = [[1.0, 0, 0, 0], [1.0] * 4, [0.0] * 4, [0.0] * 4]
  ctx, (part,), drawn = guided('teacher_response', rewards, teacher_right={0, 2, 3}, cut={3})
  changed = [i for i in range(16) if part.texts[i] != drawn.texts[i]]
  slots = sorted(i // 4 for i in changed)
  assert slots == [0, 2]  # 1 is not hard; the answer to 3 was cut and cannot be closed
  for row in changed:
    assert drawn.reward[row] == 0 and part.reward[row] == 1
    assert part.rollout.role_id[row] == types.TEACHER
    assert part.texts[row] in [f'teacher {row // 4}.{i} \\boxed{{{row // 4}}}' for i in range(4)]
  same = [i for i in range(32) if i not in changed]
  for name, value in trees.named_leaves(part.rollout).items():
    np.testing.assert_array_equal(np.asarray(value)[same],
                                  np.asarray(getattr(drawn.rollout, name))[same], err_msg=name)
  np.testing.assert_array_equal(part.rollout.group_id, drawn.rollout.group_id)
  np.testing.assert_array_equal(part.rollout.reward, part.reward)


def test_teacher_response_without_a_right_answer_changes_nothing():
  ctx, (part,), drawn = guided('teacher_response', [[0.0] * 4], teacher_right=set())
  assert part is drawn and types.POLICY not in [k['role'] for _, k in ctx.draws]


# The same on real models.


def real_context(name: str, **changes):
  run = tiny.make_run(name, **changes)
  return run, context.StepContext(run.setup, tiny.weights(1), step=0, version=0, stream=run.stream)


def logp_of(rollout: types.Rollout) -> np.ndarray:
  """Log-probs of all tokens by a plain forward of the student."""
  out = decoder.forward(tiny.model(), tiny.weights(1), rollout.tokens,
                        segment_ids=rollout.segment_ids, positions=rollout.positions)
  logp = jax.nn.log_softmax(out.logits)[:, :-1]
  found = jnp.take_along_axis(logp, rollout.tokens[:, 1:, None], axis=2)[..., 0]
  return np.pad(np.asarray(found), ((0, 0), (1, 0)))


@pytest.mark.parametrize('kind', [BCQ, NCQ])
def test_candidates_condition_and_are_never_a_target(kind):
  """Truth 4: every loss token is the student's own; other candidates change the prompt alone."""
  _, ctx = real_context('zppo')
  found = []
  for trace in ('1+2=3', '9-9=0'):
    body = (text.build_ncq('1+2', [trace], [], text.SHORT) if kind == NCQ else
            text.build_bcq('1+2', '1+2=3', trace, np.random.default_rng(0), text.SHORT))
    group = api.Group(0, kind=kind, messages=(types.Message('user', body),))
    found.append(ctx.draw([group], capacity=2, reformulated=True).rollout)
  a, b = (jax.tree.map(np.asarray, r) for r in found)
  prompt = len(ctx._setup.questions.render((types.Message('user', body),)))
  for rollout in (a, b):
    assert not rollout.loss_mask[:, :prompt].any() and rollout.loss_mask[:4, prompt].all()
    assert (rollout.role_id == types.POLICY).all() and not rollout.loss_mask[4:].any()
  same = a.segment_ids * b.segment_ids > 0
  assert (a.tokens[:4, :prompt] != b.tokens[:4, :prompt]).any()
  assert not np.allclose(a.behavior_logp[same & a.loss_mask], b.behavior_logp[same & a.loss_mask])
  # With the rollouts held fixed, the signal does not see the prompt.
  credit = zppo.build(small(group_size=4)).credit
  scores = types.Scores(minibatch=jnp.zeros(8, jnp.int32))
  held = dataclasses.replace(a, reward=np.asarray([1, 0, 0, 0, 0, 0, 0, 0], np.float32))
  other = dataclasses.replace(held, tokens=np.where(held.turn_id > 0, held.tokens, b.tokens))
  one, two = (credit((), jax.tree.map(jnp.asarray, r), scores)[1] for r in (held, other))
  jax.tree.map(np.testing.assert_array_equal, one, two)
  assert (np.asarray(one.mask) <= a.loss_mask).all()


def test_one_minibatch_leaves_every_ratio_at_one():
  """Truth 10, with both kinds of reformulated groups in the step."""
  run = tiny.make_run('zppo', iterations=1)
  programs, kinds = run_lib.compile_programs(run), set()
  now = run_lib.initial_state(run, programs)
  with jax.set_mesh(run.setup.mesh):
    for at in range(3):
      taken = tiny.take_step(run, programs, now, at)
      now = taken.after
      valid = [np.asarray(r.valid) for r in taken.item.rollouts]
      kinds |= {k for r, v in zip(taken.item.rollouts, valid) for k in np.asarray(r.kind)[v]}
      assert taken.metrics['ratio/ratio_mean'] == 1 and taken.metrics['ratio/approx_kl'] == 0
      assert not any(taken.metrics[f'ratio/clip_frac_{s}'] for s in ('low', 'high', 'dual'))
  assert kinds == {0, BCQ, NCQ} and now.updates > 0


def test_a_teacher_of_another_tokenizer_exchanges_text_alone():
  known = tiny.tokenizer()
  other = dataclasses.replace(known, characters=known.characters[::-1])
  run = tiny.make_run('zppo')
  questions = dataclasses.replace(tiny.questions(), tokenizer=other)
  model = tiny.model(vocab=-(-other.vocab_size // 8) * 8, num_valid=other.vocab_size)
  setup = dataclasses.replace(run.setup, teacher_questions=questions, teacher=(
    model, params_lib.init(model, jax.random.key(7))))
  ctx = context.StepContext(setup, tiny.weights(1), step=0, version=0, stream=run.stream)
  drawn = ctx.draw([api.Group(3)], capacity=1, role=types.TEACHER)
  r = jax.tree.map(np.asarray, drawn.rollout)
  assert questions.plain_ids(3) != tiny.questions().plain_ids(3)
  assert tuple(r.tokens[0, r.segment_ids[0] > 0])[:len(questions.plain_ids(3))] == (
    questions.plain_ids(3))
  assert drawn.texts == tuple(other.decode(t[m].tolist()) for t, m in zip(r.tokens, r.turn_id > 0))
  for name in ('distill_on', 'opd'):
    with pytest.raises(UserError, match='another tokenizer'):
      distilled = tiny.make_run(name)
      run_lib.frozen_roles(dataclasses.replace(distilled, setup=dataclasses.replace(
        distilled.setup, teacher_questions=questions)))


def test_a_forced_prefix_is_outside_the_loss_but_conditions():
  _, ctx = real_context('zppo_prefix')
  plain = len(ctx._setup.questions.plain_ids(0))
  rollouts = {}
  for prefix in ('12', '98'):
    ids = ctx.encode(prefix)
    drawn = ctx.draw([api.Group(0, kind=guidance.PREFIX, forced=ids)], capacity=2, forced_tokens=6)
    r = rollouts[prefix] = jax.tree.map(np.asarray, drawn.rollout)
    assert (r.tokens[:4, plain:plain + 2] == ids).all() and drawn.texts[0].startswith(prefix)
    assert not r.loss_mask[:, :plain + 2].any() and r.loss_mask[:4, plain + 2].all()
    assert not r.behavior_logp[~r.loss_mask].any()
    np.testing.assert_array_equal(r.traj_tokens, r.loss_mask.sum(1))
    np.testing.assert_allclose(r.behavior_logp[r.loss_mask], logp_of(r)[r.loss_mask], atol=1e-4)
  a, b = rollouts.values()
  assert (a.tokens[:4, plain + 2:] != b.tokens[:4, plain + 2:]).any()


def test_old_logp_of_a_teacher_response_is_the_students():
  run, ctx = real_context('zppo_teacher_response')
  right = jnp.asarray(ctx.encode('3'))
  questions = run.stream
  drawn = ctx.draw([api.Group(int(q)) for q in next(questions)], capacity=tiny.SLOTS)
  given = ctx.draw([api.Group(drawn.groups[2].question, response=tuple(right.tolist()))],
                   capacity=tiny.SLOTS, group_size=1)
  part = guidance._replace_rows(drawn, given, [9])
  programs = run_lib.compile_programs(run)
  params = {'policy': tiny.weights(1)}
  _, (out,) = programs.prepare(params, (), (part.rollout,), jax.random.key(0), programs.roles, (4,))
  out = tiny.copy(out)
  row, = np.flatnonzero(out.rollout.role_id == types.TEACHER)
  mask = out.signal.mask[row]
  assert mask.sum() == 2 and out.rollout.reward[row] == 1  # the digit and the stop token
  np.testing.assert_allclose(out.signal.old_logp[row][mask], logp_of(out.rollout)[row][mask],
                             atol=1e-4)
  assert not out.rollout.behavior_logp[row].any()


# Bad input.


@pytest.mark.parametrize('field,changes', [
  ('tau', dict(tau=0.0)), ('tau', dict(tau=1.5)), ('tau', dict(tau=-0.5)),
  ('rho_replay', dict(rho_replay=-0.1)), ('rho_aug', dict(rho_aug=-0.1)),
  ('rho_aug', dict(rho_aug=0.1, num_new=8)),
  ('rho_aug', dict(rho_aug=0.1, num_new=8, use_bcq=False)),
  ('rho_aug', dict(rho_aug=0.1, num_new=8, use_bcq=False, use_ncq=False, guide='hint')),
  ('group_size', dict(group_size=1)), ('teacher_group_size', dict(teacher_group_size=0)),
  ('buffer_capacity', dict(buffer_capacity=0)), ('iterations', dict(iterations=0)),
  ('iterations', dict(iterations=9, num_new=8)), ('num_new', dict(num_new=0)),
  ('guide', dict(guide='hint')), ('guide', dict(guide='tips', use_bcq=False, use_ncq=False)),
  ('norm', dict(norm='zero')), ('norm_scope', dict(norm_scope='group')),
  ('wording', dict(wording='long')), ('compress', dict(compress='zip')),
  ('eps_low', dict(eps_low=0.0)), ('eps_high', dict(eps_high=0.0)),
  ('dual_clip', dict(dual_clip=1)),
  ('prefix_fraction', dict(prefix_fraction=1.0)), ('compress_tokens', dict(compress_tokens=0)),
  ('teacher_chunk', dict(teacher_chunk=0)),
])
def test_bad_fields_are_refused_by_name(field, changes):
  with pytest.raises(ValueError, match=rf'\b{field}\b'):
    zppo.build(small(**changes))


def test_switches_lift_the_bounds_that_they_make_idle():
  off = dict(use_bcq=False, use_ncq=False)
  zppo.build(small(rho_aug=0.0, **off))
  zppo.build(small(teacher_group_size=0, use_bcq=False))
  assert zppo.build(small(**off)).needs == frozenset()
  assert zppo.build(small(use_bcq=False)).needs == frozenset()  # NCQ with tails asks no teacher
  assert 'teacher' in zppo.build(small(use_bcq=False, compress='teacher')).needs
  assert 'teacher' in zppo.build(small(use_ncq=False)).needs


@pytest.mark.parametrize('value', [-0.5, 1.5, float('nan'), float('inf'), 0.5])
def test_bad_rewards_are_refused(value):
  run = tiny.make_run('zppo', grader=tiny.FixedGrader(value))
  ctx = context.StepContext(run.setup, tiny.weights(1), step=0, version=0)
  with pytest.raises(RewardError, match='reward'):
    ctx.draw([api.Group(0)], capacity=tiny.SLOTS)


def test_fractional_rewards_need_permission():
  run = tiny.make_run('zppo', grader=tiny.FixedGrader(0.5))
  setup = dataclasses.replace(run.setup, allow_fractional=True)
  ctx = context.StepContext(setup, tiny.weights(1), step=0, version=0)
  assert ctx.draw([api.Group(0)], capacity=tiny.SLOTS).reward[0] == 0.5


def test_a_run_without_a_teacher_is_refused():
  run = tiny.make_run('zppo')
  ctx = context.StepContext(dataclasses.replace(run.setup, teacher=None), tiny.weights(1), step=0,
                            version=0)
  with pytest.raises(UserError, match='teacher'):
    ctx.draw([api.Group(0)], capacity=tiny.SLOTS, role=types.TEACHER)


def test_a_prompt_beyond_its_bucket_is_refused_not_cut():
  run, ctx = real_context('zppo')
  group = api.Group(3, kind=NCQ, messages=(types.Message('user', 'x' * 200),))
  uid = ctx.example(3).uid
  with pytest.raises(UserError, match=f'{uid}.*201 tokens.*{tiny.REFORMULATED}'):
    ctx.draw([group], capacity=2, reformulated=True)


def test_the_prompt_bound_holds_for_every_instance():
  """What the config check promises: the longest BCQ and NCQ prompts fit under `prompt_bound`."""
  for name, w in text.WORDINGS.items():
    encode = lambda s: tiny.tokenizer().encode(s)
    trace = '9' * 16  # compressed to the cap, answers of ordinary length
    body = text.build_ncq('1' * 20, [trace] * 8, [str(i) * 2 for i in range(8)], w)
    pair = text.build_bcq('1' * 20, trace, trace, np.random.default_rng(0), w)
    if name == 'full':  # the bound counts sentences in tokens of a large vocabulary, not characters
      for sentence in (w.bcq, w.ncq, w.traces):
        assert len(sentence.split()) * 2 < 128
    else:
      bound = text.prompt_bound(21, 8, 16, name)
      assert max(len(encode(body)), len(encode(pair))) + 1 <= bound


def test_an_unknown_question_in_a_restored_buffer_is_refused():
  buffer = prompt_buffer.update(prompt_buffer.init(4, 8), jnp.asarray([70]), jnp.zeros(1),
                                jnp.ones(1, bool), tau=0.5)
  with pytest.raises(ValueError, match='question_id.*70'):
    prompt_buffer.check_restored(buffer, len(tiny.source()))


def test_every_baseline_of_the_table_is_a_switch_of_this_builder():
  for name in sorted(n for n in table.METHODS if n.startswith('zppo')):
    row = table.METHODS[name]
    assert row.build is zppo.build and isinstance(row.defaults, zppo.Config)
    published = dict(group_size=8, teacher_group_size=4, tau=0.5, rho_replay=0.25, rho_aug=0.25,
                     buffer_capacity=10_000, iterations=4, eps_low=0.2, eps_high=0.28,
                     dual_clip=10.0, norm='without_zero', num_new=384, compress_tokens=512)
    assert {k: getattr(row.defaults, k) for k in published} == published


def test_a_step_says_how_many_questions_could_be_reformulated():
  """Of four questions one is easy, two are hard with a right teacher, one is beyond it."""
  ctx, config = FakeContext(teacher_right=frozenset({1, 2})), small(num_new=16)
  drawn = make_drawn([api.Group(q) for q in range(4)], [[1.0, 1.0], [0, 0], [0, 1], [0, 0]])
  hard = second_phase.hard_slots(drawn, 0.9)
  right = second_phase.right_traces(drawn, hard, ctx, group_size=2, chunk=4)
  zppo.choose_instances(config, drawn, right, hard, ctx)
  share = {k: n / d for k, (n, d) in ctx.counts.items()}
  assert share['second_phase/easy_frac'] == 0.25 and share['teacher/solved_frac'] == 2 / 3
  assert share['second_phase/ncq_eligible_frac'] == 1
  assert share['second_phase/bcq_eligible_frac'] == 2 / 3
  assert share['teacher/sampled_tokens'] == 3 * 2 * 3


def test_an_answer_of_any_length_ends_no_run():
  """What has no room is dropped and counted; long answers are neither listed nor restored."""
  ctx, config = FakeContext(too_long=frozenset({1})), small()
  drawn = make_drawn([api.Group(q) for q in range(3)], [[0.0, 0.0]] * 3)
  chosen = [zppo.Instance(s, NCQ, (f'A{s}', f'B{s}'), ('7', '8')) for s in range(3)]
  groups = zppo.build_groups(config, drawn, chosen, ctx)
  assert [g.question for g in groups] == [0, 2]
  assert ctx.counts['second_phase/no_room_frac'] == [1, 3]
  box = '9' * 257
  body = text.build_ncq('Q?', ['t'] * 2, ['7', box])
  assert '\\boxed{7}' in body and box not in body
  assert text.restore_answer(f'\\boxed{{{box}}}', 'cut') == 'cut'
  _, real = real_context('zppo')
  fits = [real.fits(api.Group(3, messages=(types.Message('user', 'x' * n),)), reformulated=True)
          for n in (tiny.REFORMULATED - 1, tiny.REFORMULATED)]
  assert fits == [True, False]


def test_rewards_of_given_answers_are_not_the_students():
  """A student that solves nothing, with a teacher's answer in the place of one of its own."""
  groups = [api.Group(0), api.Group(1)]
  drawn = make_drawn(groups, [[0.0] * 4] * 2)
  given = make_drawn([dataclasses.replace(groups[0], response=(1,))], [[1.0]], role=types.TEACHER)
  shown = observe.rollout_metrics([guidance._replace_rows(drawn, given, [2])])
  assert shown['reward/mean'] == shown['reward/max'] == shown['group/kind0_accuracy'] == 0
  assert shown['group/pass_rate_zero'] == 1 and shown['group/kind0_zero_var_frac'] == 0.5
  teacher = make_drawn(groups, [[1.0] * 4] * 2, role=types.TEACHER)
  assert observe.rollout_metrics([teacher])['reward/mean'] == 1
