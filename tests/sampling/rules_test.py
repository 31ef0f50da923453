"""The suite that every row of LOGIT_RULES passes, and each rule against a slow reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_test import CONFIG, GROUP, prompts, responses, settings
from engine_test import assert_same
from scipy import stats

from zppo_jax import models, sampling
from zppo_jax.sampling import decode, engine, rules, score

VOCAB, ROWS = 24, 5
CLASSES = tuple(i % 3 for i in range(VOCAB))
# Settings of every rule: one that changes something, one that changes nothing (None = there is
# none), and the slow reference of the first.
EXAMPLES = {
  'temperature': (dict(value=0.7), dict(value=1.0)),
  'top_k': (dict(k=4), dict(k=0)),
  'top_p': (dict(p=0.6), dict(p=1.0)),
  'min_p': (dict(p=0.2), dict(p=0.0)),
  'penalties': (dict(presence=0.6, frequency=0.3, repetition=1.4), dict()),
  'bias': (dict(amounts=((3, 2.0), (7, -1.5))), dict(amounts=())),
  'forbid': (dict(ids=(2, 5), below=4), dict(ids=())),
  'no_repeats': (dict(size=2), None),
  'automaton': (dict(classes=CLASSES, table=((1, 0, -1), (-1, 2, 2), (0, -1, -1))),
                dict(classes=(0,) * VOCAB, table=((0,),)))}


def slow(name, z, prompt, response, *, value=1.0, k=0, p=1.0, presence=0, frequency=0,
         repetition=1, amounts=(), ids=(), below=None, size=1, classes=(), table=()):
  """One row, token by token, in numpy; float64."""
  z, out = np.asarray(z, np.float64), np.array(z, np.float64)
  probs = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
  state = 0
  for token in response:
    state = table[state][classes[token]] if name == 'automaton' else 0
  for i in range(len(z)):
    better = [j for j in range(len(z)) if z[j] > z[i]]
    dropped = (
      name == 'top_k' and len(better) >= k
      or name == 'top_p' and sum(probs[j] for j in better) >= p
      or name == 'min_p' and probs[i] < p * probs.max()
      or name == 'forbid' and i in ids and (below is None or len(response) < below)
      or name == 'no_repeats' and any(
        [*response, i][-size:] == response[s:s + size] for s in range(len(response) - size + 1))
      or name == 'automaton' and table[state][classes[i]] < 0)
    if name == 'temperature':
      out[i] = z[i] / value
    elif name == 'bias':
      out[i] += dict(amounts).get(i, 0)
    elif name == 'penalties':
      if i in prompt or i in response:
        out[i] = z[i] / repetition if z[i] > 0 else z[i] * repetition
      out[i] -= frequency * response.count(i) + presence * (i in response)
    elif dropped:
      out[i] = rules.DROPPED
  return out


def situation(seed, steps=6):
  """(logits, prompts, lengths, responses that repeat tokens and that every example allows)."""
  rng = np.random.default_rng(seed)
  cycle = [0, 4, 0, 3, 7, 6, 3]  # classes 0, 1, 0, ...: states 1, 2, 0 of the example automaton
  shift = rng.integers(0, 5, ROWS)
  responses = [[(t + 3 * int(s)) % VOCAB for t in cycle[:steps]] for s in shift]
  return (rng.normal(size=(ROWS, VOCAB)).astype(np.float32) * 2,
          rng.integers(0, VOCAB, (ROWS, 4)).astype(np.int32),
          rng.integers(1, 5, ROWS).astype(np.int32), responses)


def run(rule, prompt, length, responses, dead=()):
  """The rule's state behind the responses."""
  given = rules.Given(jnp.asarray(prompt), jnp.asarray(length), VOCAB, 8)
  state = rule.init(given)
  live = np.asarray([i not in dead for i in range(len(length))])
  for at, token in enumerate(np.asarray(responses, np.int32).T):
    state = rule.update(state, jnp.asarray(token), jnp.full(len(length), at, jnp.int32),
                        jnp.asarray(live))
  return state


@pytest.mark.parametrize('steps', [0, 1, 3, 6])
@pytest.mark.parametrize('name', rules.LOGIT_RULES)
def test_a_rule_is_its_slow_reference(name, steps):
  args = EXAMPLES[name][0]
  rule = rules.LOGIT_RULES[name](**args)
  for seed in range(5):
    z, prompt, length, drawn = situation(seed, steps)
    if name == 'top_k':
      z[0, :6] = z[0].max()  # ties stay together
    step = jnp.full(ROWS, steps, jnp.int32)
    found = jax.jit(rule.apply)(run(rule, prompt, length, drawn), jnp.asarray(z), step)
    wanted = [slow(name, z[i], prompt[i, :length[i]].tolist(), drawn[i], **args)
              for i in range(ROWS)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    if steps == 3:  # long enough for all of them
      assert not np.array_equal(found, z), 'the example changes nothing'


@pytest.mark.parametrize('name', [n for n in rules.LOGIT_RULES if EXAMPLES[n][1] is not None])
def test_a_neutral_rule_is_the_identity(name):
  rule = rules.LOGIT_RULES[name](**EXAMPLES[name][1])
  z, prompt, length, drawn = situation(0)
  found = rule.apply(run(rule, prompt, length, drawn), jnp.asarray(z), jnp.full(ROWS, 6, jnp.int32))
  np.testing.assert_array_equal(found, z)


@pytest.mark.parametrize('name', rules.LOGIT_RULES)
def test_a_row_never_sees_another_and_a_dead_row_stays(name):
  rule = rules.LOGIT_RULES[name](**EXAMPLES[name][0])
  z, prompt, length, drawn = situation(1)
  step, order = jnp.full(ROWS, 6, jnp.int32), np.asarray([3, 0, 4, 2, 1])
  whole = rule.apply(run(rule, prompt, length, drawn), jnp.asarray(z), step)
  turned = rule.apply(run(rule, prompt[order], length[order], [drawn[i] for i in order]),
                      jnp.asarray(z[order]), step)
  np.testing.assert_array_equal(turned, whole[order])
  start = rule.init(rules.Given(jnp.asarray(prompt), jnp.asarray(length), VOCAB, 8))
  still = run(rule, prompt, length, drawn, dead=(2,))
  for a, b in zip(jax.tree.leaves(still), jax.tree.leaves(start)):
    assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_array_equal(a[2], b[2])


@functools.cache
def weights():
  return models.init(CONFIG, jax.random.key(0))


@pytest.mark.parametrize('name', rules.LOGIT_RULES)
def test_rules_in_the_loop(name):
  """Slots draw what the fixed batch draws, nothing dropped is drawn, and the kept mass leads back
  to the model's own log-prob."""
  args = EXAMPLES[name][0]
  if name == 'automaton':  # a stop token must be allowed somewhere
    args = dict(classes=CLASSES, table=((1, 0, 2), (0, 2, -1), (0, -1, 1)))
  rule = rules.LOGIT_RULES[name](**args)
  batch = dataclasses.replace(prompts(), request=np.arange(4, dtype=np.uint32))
  given = dict(key=jax.random.key(0), settings=settings(rules=(rule,)))
  found = jax.tree.map(np.asarray, sampling.generate(CONFIG, weights(), batch, **given))
  slots, _ = engine.run(CONFIG, weights(), batch, **given, engine=engine.Engine(5, steps=3))
  assert_same(slots, found)
  plain = responses(sampling.generate(CONFIG, weights(), batch, key=jax.random.key(0),
                                      settings=settings()))
  assert plain != responses(found), 'the rule changed no draw'
  scored = score.score(CONFIG, weights(), found, window=12, chunk=4,
                       temperature=args.get('value', 1.0))
  np.testing.assert_allclose(scored.logp, found.behavior_logp + (
    0 if found.log_kept_mass is None else found.log_kept_mass), atol=1e-5)
  assert found.behavior_logp.min() > -20
  for row, ids in enumerate(responses(found)):
    prompt = batch.tokens[row // GROUP, :batch.length[row // GROUP]].tolist()
    for at, token in enumerate(ids):
      if name in ('forbid', 'no_repeats', 'automaton'):
        left = slow(name, np.zeros(VOCAB), prompt, [int(t) for t in ids[:at]], **args)
        assert left[token] == 0


OPTIONS = [dict(), dict(temperature=0.5), dict(temperature=1.7), dict(top_k=3), dict(top_p=0.55),
           dict(min_p=0.15), dict(presence=1.0, repetition=1.3),
           dict(temperature=0.8, top_k=9, top_p=0.9, min_p=0.05),
           dict(temperature=1.3, top_k=6, min_p=0.1, frequency=0.5),
           dict(rules=(rules.bias(((4, 1.0),)), rules.forbid((6, 7)), rules.no_repeats(1))),
           dict(rules=(rules.automaton(*EXAMPLES['automaton'][0].values()),), top_p=0.8)]


@pytest.mark.parametrize('options', OPTIONS, ids=range(len(OPTIONS)))
def test_draws_follow_the_exact_distribution(options):
  """Chi-square over 20 000 draws of one row, for every sampling option."""
  options = settings(**options)
  rng = np.random.default_rng(3)
  logits, prompt = jnp.asarray(rng.normal(size=(1, VOCAB)) * 0.7, jnp.float32), [1, 9, 4]
  given = rules.Given(jnp.asarray([prompt], jnp.int32), jnp.asarray([3]), VOCAB, 4)
  states = rules.init(options.chain, given)
  for at, token in enumerate((0, 4)):  # a response that began
    states = rules.update(options.chain, states, jnp.asarray([token]), jnp.asarray([at]),
                          jnp.asarray([True]))
  count = 20_000
  wide = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), tree)
  keys = jax.random.split(jax.random.key(5), count)
  token, logp, kept = decode.choose(wide(logits), keys, jnp.full(count, 2), options, wide(states))
  found = np.bincount(token, minlength=VOCAB)
  z = np.asarray(logits[0], np.float64)
  for rule in options.rules:
    args = {'bias': dict(amounts=((4, 1.0),)), 'forbid': dict(ids=(6, 7)), 'no_repeats': dict(
      size=1), 'automaton': EXAMPLES['automaton'][0]}[rule.name]
    z = slow(rule.name, z, prompt, [0, 4], **args)
  z = slow('penalties', z, prompt, [0, 4], presence=options.presence,
           frequency=options.frequency, repetition=options.repetition) / options.temperature
  for name, args in (('top_k', dict(k=options.top_k or VOCAB)), ('top_p', dict(p=options.top_p)),
                     ('min_p', dict(p=options.min_p))):
    z = slow(name, z, prompt, [0, 4], **args) if args != dict(p=1.0) else z
  probs = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
  live = probs > 0
  assert not found[~live].any(), 'a dropped token was drawn'
  assert stats.chisquare(found[live], count * probs[live]).pvalue > 1e-3
  np.testing.assert_allclose(logp, np.log(probs[token]), atol=1e-5)
  assert (kept is None) == (options.chain in ((), (rules.temperature(0.5),), (
    rules.temperature(1.7),)))


@pytest.mark.parametrize('bad', [
  lambda state, z, step: z[:, :-1], lambda state, z, step: z.astype(jnp.bfloat16)])
def test_a_rule_of_another_shape_is_refused_by_name(bad):
  broken = rules.LogitRule('broken', bad)
  with pytest.raises(ValueError, match=r"rule 'broken' must return float32\[12, 24\], got"):
    sampling.generate(CONFIG, weights(), prompts(), key=jax.random.key(0),
                      settings=settings(rules=(broken,)))


@pytest.mark.parametrize('name, args, part', [
  ('temperature', dict(value=0.0), 'temperature must be above 0, got 0.0'),
  ('top_k', dict(k=-1), 'top_k must be at least 0'), ('top_p', dict(p=0.0), 'top_p must be in'),
  ('min_p', dict(p=1.0), 'min_p must be in'), ('forbid', dict(ids=(-1,)), 'forbid must be ids'),
  ('bias', dict(amounts=((1, float('nan')),)), 'bias must be'),
  ('no_repeats', dict(size=0), 'no_repeats must be at least 1, got 0'),
  ('automaton', dict(classes=(0, 1), table=((0,),)), 'automaton must be a row of 2'),
  ('automaton', dict(classes=(0,), table=((1,),)), 'automaton must be next states in -1 .. 0'),
  ('automaton', dict(classes=(0,), table=((-1,),)), 'one allowed in each row')])
def test_rules_out_of_range_are_refused(name, args, part):
  with pytest.raises(ValueError, match=part):
    rules.LOGIT_RULES[name](**args)
