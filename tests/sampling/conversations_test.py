"""Conversations: turns from the cache are turns from scratch, whatever the slots and chunks."""

import dataclasses

import jax
import numpy as np
import pytest
from decode_test import CONFIG, EOS, settings
from engine_test import MODELS, text_of, weights

from zppo_jax import models
from zppo_jax.mesh import place
from zppo_jax.models import decoder
from zppo_jax.models import params as params_lib
from zppo_jax.sampling import conversations, decode, rules, slots, stops

OPTIONS = settings(group_size=1)
SHAPE = conversations.Shape(slots=4, context=64, steps=3, chunks=(4, 16))


def request(seed, size=7, **changes):
  tokens = tuple(np.random.default_rng(seed).integers(3, 21, size).tolist())
  return conversations.Request(tokens, **(dict(max_tokens=8, name=seed) | changes))


def alone(name, r, options=OPTIONS):
  """The answer of the fixed batch, the whole conversation as one prompt, cut at max_tokens."""
  tokens = np.zeros((1, SHAPE.context), np.int32)
  tokens[0, :len(r.tokens)] = r.tokens
  prompts = decode.Prompts(
    tokens=tokens, length=np.asarray([len(r.tokens)], np.int32),
    forced=np.zeros((1, 0), np.int32), forced_length=np.zeros(1, np.int32),
    request=np.asarray([r.name], np.uint32), group_id=np.zeros(1, np.int32),
    kind=np.zeros(1, np.int32), question_id=np.zeros(1, np.int32), valid=np.ones(1, bool))
  found = jax.tree.map(np.asarray, decode.generate(
    MODELS[name], weights(name), prompts, key=jax.random.key(0),
    settings=dataclasses.replace(options, group_size=2)))
  mask = found.turn_id[r.sample] > 0
  drawn = found.tokens[r.sample][mask][:r.max_tokens].tolist()
  return drawn, found.behavior_logp[r.sample][mask][:r.max_tokens], drawn[-1] == EOS


def talk(name, chat, requests, options=OPTIONS, **kwargs):
  return chat.generate(weights(name), requests, key=jax.random.key(0), settings=options, **kwargs)


def assert_alone(name, requests, answers, options=OPTIONS):
  for r, a in zip(requests, answers):
    tokens, logp, stopped = alone(name, r, options)
    assert list(a.tokens) == tokens and a.stopped == stopped
    np.testing.assert_allclose(a.logp, logp, atol=1e-5)


def go_on(requests, answers, seed=50):
  """The next turn: what was said, then some tokens of the other side."""
  return [dataclasses.replace(r, tokens=r.tokens + a.tokens + request(seed + i, 1 + 3 * i).tokens,
                              name=r.name + 100) for i, (r, a) in enumerate(zip(requests, answers))]


@pytest.mark.parametrize('name', MODELS)
def test_turns_from_the_cache_are_turns_from_scratch(name):
  """Three turns of five conversations in four slots, two of them the same prompt."""
  chat = conversations.Conversations(MODELS[name], SHAPE)
  requests = [request(0), request(1, 13), request(1, 13, sample=1), request(3, 1),
              request(4, 2, max_tokens=3)]
  reused = []
  for _ in range(3):
    answers = talk(name, chat, requests)
    assert_alone(name, requests, answers)
    reused.append([a.reused for a in answers])
    requests = go_on(requests, answers)
  assert reused[0] == [0, 0, 13, 0, 0]  # the second sample of a prompt copies the first
  sizes = [len(r.tokens) for r in requests]
  for turn in reused[1:]:  # one of five finds no slot that still holds it
    assert sorted(n > 0 for n in turn) >= [False] * 2 + [True] * 3, reused
  assert max(sizes) > 40


@pytest.mark.parametrize('shape', [(1, 1, (1,)), (2, 16, (64,)), (7, 5, (3, 8, 9))], ids=str)
def test_slots_and_chunks_change_nothing(shape):
  rows, steps, chunks = shape
  chat = conversations.Conversations(MODELS['hybrid'], conversations.Shape(rows, 64, steps, chunks))
  requests = [request(i, 3 + 2 * i) for i in range(5)]
  for _ in range(2):
    answers = talk('hybrid', chat, requests)
    assert_alone('hybrid', requests, answers)
    requests = go_on(requests, answers)


def test_a_pause_while_others_decode_leaves_a_row_as_it_was():
  """A recurrent state is not moved by the steps of its neighbours."""
  chat = conversations.Conversations(MODELS['hybrid'], SHAPE)
  first = [request(0)]
  answers = talk('hybrid', chat, first)
  talk('hybrid', chat, [request(i, 5) for i in (7, 8, 9)])
  later = go_on(first, answers)
  found = talk('hybrid', chat, later)
  assert found[0].reused == len(first[0].tokens) + len(answers[0].tokens)
  assert_alone('hybrid', later, found)


@pytest.mark.parametrize('name', ['full', 'hybrid'])
def test_a_rewritten_history_is_run_again(name):
  chat = conversations.Conversations(MODELS[name], SHAPE)
  requests = [request(0, 12)]
  answers = talk(name, chat, requests)
  other = (*requests[0].tokens[:5], 22, *answers[0].tokens)
  changed = [dataclasses.replace(requests[0], tokens=other)]
  found = talk(name, chat, changed)
  assert found[0].reused == 0  # they agree on 5 tokens, where no turn ended
  assert_alone(name, changed, found)


def test_a_fork_behind_an_earlier_turn_goes_on_from_there():
  """Keys and values may be cut back to the end of any turn, a recurrence may not."""
  for name, wanted in (('full', True), ('hybrid', False)):
    chat = conversations.Conversations(MODELS[name], SHAPE)
    first = [request(0, 12)]
    second = go_on(first, talk(name, chat, first))
    talk(name, chat, second)
    fork = [dataclasses.replace(second[0], tokens=second[0].tokens[:-1] + (22, 9), name=7)]
    found = talk(name, chat, fork)
    end = len(second[0].tokens) - 1  # behind the first answer, before what the other side said
    assert found[0].reused == (end if wanted else 0)
    assert_alone(name, fork, found)


def test_the_same_request_again_is_the_same_answer():
  for name in ('full', 'hybrid'):
    chat = conversations.Conversations(MODELS[name], SHAPE)
    first, second = (talk(name, chat, [request(5)])[0] for _ in range(2))
    assert first.tokens == second.tokens


def test_other_weights_make_slots_forget():
  chat = conversations.Conversations(CONFIG, SHAPE)
  first = [request(0)]
  later = go_on(first, talk('full', chat, first, version=1))
  assert talk('full', chat, later, version=2)[0].reused == 0
  other = jax.tree.map(lambda x: 1.5 * x, weights('full'))
  found = chat.generate(other, later, key=jax.random.key(0), settings=OPTIONS, version=3)
  assert found[0].tokens != tuple(alone('full', later[0])[0])


def test_rules_start_anew_with_every_turn():
  options = dataclasses.replace(OPTIONS, presence=0.8, repetition=1.5, top_p=0.9,
                                rules=(rules.no_repeats(1),))
  chat = conversations.Conversations(CONFIG, SHAPE)
  requests = [request(0), request(1, 3)]
  for _ in range(2):
    answers = talk('full', chat, requests, options)
    assert_alone('full', requests, answers, options)
    assert all(len(a.log_kept_mass) == len(a.tokens) for a in answers)
    requests = go_on(requests, answers)


@pytest.mark.parametrize('name', ['full', 'hybrid'])
def test_stop_strings_end_a_turn_and_the_next_goes_on_behind_them(name):
  chat = conversations.Conversations(MODELS[name], SHAPE)
  requests = [request(i) for i in range(4)]
  free = [alone(name, r)[0] for r in requests]
  string = text_of(free[0])[1:3]
  stop = stops.stop_strings([string], text_of)
  answers = talk(name, chat, requests, stop=stop)
  for tokens, a in zip(free, answers):
    size = next((n for n in range(len(tokens) + 1) if string in text_of(tokens[:n])), len(tokens))
    assert list(a.tokens) == tokens[:size]
  assert answers[0].stopped and len(answers[0].tokens) < len(free[0])
  later = go_on(requests, answers)
  assert_alone(name, later, talk(name, chat, later))


def test_nothing_compiles_after_the_first_conversations():
  chat = conversations.Conversations(CONFIG, SHAPE)
  programs = slots.append, slots.copy, slots.start, slots.steps, slots.empty
  sizes = []
  for seed in range(3):
    requests = [request(10 * seed + i, 3 + i) for i in range(3)] + [request(10 * seed, 3, sample=1)]
    for _ in range(2):
      requests = go_on(requests, talk('full', chat, requests))
    sizes.append([p._cache_size() for p in programs])
  assert sizes[1] == sizes[2]


def test_eight_devices_answer_the_same():
  mesh = place.make_mesh(dict(data=2, fsdp=2, tensor=2), jax.devices()[:8])
  requests = [request(i, 3 + i) for i in range(5)]
  with jax.set_mesh(mesh):
    shardings = params_lib.shardings(params_lib.abstract(CONFIG), mesh)
    params = jax.device_put(weights('full'), shardings)
    chat = conversations.Conversations(CONFIG, dataclasses.replace(SHAPE, slots=8))
    answers = chat.generate(params, requests, key=jax.random.key(0), settings=OPTIONS)
  assert_alone('full', requests, answers)


def test_log_probs_are_those_of_one_forward_over_the_conversation():
  chat = conversations.Conversations(MODELS['latent'], SHAPE)
  requests = [request(0)]
  later = go_on(requests, talk('latent', chat, requests))
  answer = talk('latent', chat, later)[0]
  row = np.asarray([later[0].tokens + answer.tokens])
  logp = jax.nn.log_softmax(decoder.forward(MODELS['latent'], weights('latent'), row).logits[0])
  wanted = [logp[len(later[0].tokens) - 1 + i, t] for i, t in enumerate(answer.tokens)]
  np.testing.assert_allclose(answer.logp, wanted, atol=1e-4)


@pytest.mark.parametrize('changes, part', [
  (dict(tokens=()), 'the prompt is empty'), (dict(max_tokens=0), 'max_tokens must lie in 1..12'),
  (dict(max_tokens=13), 'got 13'), (dict(tokens=(3,) * 60), '60 tokens and 8 new ones are more'),
  (dict(tokens=(24,)), 'token ids must lie in 0..23')])
def test_requests_that_do_not_fit_are_named(changes, part):
  chat = conversations.Conversations(CONFIG, SHAPE)
  with pytest.raises(ValueError, match=part):
    talk('full', chat, [request(1), dataclasses.replace(request(0), **changes)])
  assert len(talk('full', chat, [request(1)])) == 1


@pytest.mark.parametrize('changes', [dict(slots=0), dict(context=1), dict(steps=0),
                                     dict(chunks=()), dict(chunks=(0, 4))], ids=str)
def test_shapes_are_checked(changes):
  with pytest.raises(ValueError, match=f'shape.{next(iter(changes))}'):
    conversations.Conversations(CONFIG, dataclasses.replace(SHAPE, **changes))


def test_a_stop_token_ends_a_turn():
  chat = conversations.Conversations(CONFIG, SHAPE)
  answers = talk('full', chat, [request(i) for i in range(12)])
  assert {a.stopped for a in answers} == {True, False}
  for a in answers:
    assert a.stopped == (a.tokens[-1] == EOS) and (a.stopped or len(a.tokens) == 8)


@pytest.mark.parametrize('longest, calls', [
  (1, 1), (32, 1), (33, 2), (127, 4), (128, 1), (256, 1), (300, 3), (600, 5)])
def test_chunks_are_not_mostly_padding(longest, calls):
  left, sizes = longest, []
  while left > 0:
    sizes.append(conversations._chunk((32, 256), left))
    left -= sizes[-1]
  assert len(sizes) == calls and sum(sizes) < max(2 * longest + 1, longest + 32)


@pytest.mark.parametrize('name', ['full', 'hybrid'])
def test_logits_that_are_not_finite_are_a_fault_and_leave_nothing_behind(name):
  """The head is not tied to the embedding: only rows that read token 5 meet a NaN."""
  config = dataclasses.replace(MODELS[name], tied=False)
  whole = models.init(config, jax.random.key(0))
  broken = dataclasses.replace(whole, embed=whole.embed.at[5].set(np.nan))
  options, given = dataclasses.replace(OPTIONS, rules=(rules.forbid((5,)),)), dict(
    key=jax.random.key(0))
  chat, fresh = (conversations.Conversations(config, dataclasses.replace(SHAPE, slots=1))
                 for _ in range(2))
  bad = conversations.Request((7, 5, 9, 9, 6, 9), 8)  # two chunks
  good = conversations.Request((7, 6, 9, 11), 8)
  for _ in range(2):
    answer, = chat.generate(broken, [bad], settings=options, **given)
    assert answer.fault and answer.tokens == () and not answer.stopped and answer.reused == 0
  found, = chat.generate(broken, [good], settings=options, **given)
  wanted, = fresh.generate(whole, [good], settings=options, **given)
  assert found.tokens == wanted.tokens and len(found.tokens) > 1 and not found.fault
  np.testing.assert_allclose(found.logp, wanted.logp, atol=1e-5)


@pytest.mark.parametrize('name', ['full', 'sliding', 'latent', 'hybrid'])
def test_what_a_stop_string_cut_off_is_not_gone_on_from(name):
  """The slot stands behind the cut: its logits are not those of the cut answer."""
  chat, cut = conversations.Conversations(MODELS[name], SHAPE), 0
  for seed in range(6):
    first, = talk(name, chat, [request(seed)], stop=stops.stop_strings(('l', 'e', 'n'), text_of))
    if not first.stopped or first.tokens[-1] == EOS:
      continue
    cut += 1
    again = request(seed, name=seed + 50)
    again = dataclasses.replace(again, tokens=again.tokens + first.tokens)
    assert_alone(name, [again], talk(name, chat, [again]))
  assert cut >= 2


def test_a_call_that_was_interrupted_leaves_the_slots_usable():
  def interrupt(tokens, begin):
    raise KeyboardInterrupt

  chat = conversations.Conversations(MODELS['full'], SHAPE)
  with pytest.raises(KeyboardInterrupt):
    talk('full', chat, [request(0), request(1)], stop=interrupt)
  assert talk('full', chat, []) == []
  assert_alone('full', [request(2)], talk('full', chat, [request(2)]))
