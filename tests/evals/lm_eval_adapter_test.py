"""The harness's requests on a tiny model: sums by hand, its conventions, and the harness itself."""

import functools
import json
import os
import random
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import tokenizers

from experiments import evaluate_harness as cli
from zppo_jax import models
from zppo_jax.agents import policy
from zppo_jax.agents.records import Completion
from zppo_jax.core.errors import UserError
from zppo_jax.data import jinja_templates
from zppo_jax.data import tokenizer as tokenizer_lib
from zppo_jax.evals import lm_eval_adapter as harness
from zppo_jax.launch import roles
from zppo_jax.mesh import place
from zppo_jax.models import decoder
from zppo_jax.sampling import conversations, stops
from zppo_jax.train import checkpoint

TOKENIZER = tokenizer_lib.CharTokenizer(pieces=(' yes', ' no', 'ab', 'ba\n'))
BOS = TOKENIZER.bos_id
CONFIG = models.ModelConfig(
  vocab=112, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, inter=48, context=96,
  num_valid=TOKENIZER.vocab_size)
ROOM = 256  # tokens of any row here
WORDS = ('is it', 'yes', ' no', 'ab', ' abba\n', 'why?', '  ', '3+4=')


@pytest.fixture(scope='module', autouse=True)
def quick_compiles():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@functools.cache
def params():
  """Weights large enough that answers differ, and end at different places."""
  made = jax.jit(models.init, static_argnums=0)(CONFIG, jax.random.key(0))
  return jax.tree.map(lambda x: 3 * np.asarray(x) if x.ndim > 1 else np.asarray(x), made)


@functools.cache
def logits():
  return jax.jit(lambda row: decoder.forward(CONFIG, params(), row).logits[0])


def table(ids):
  """Log-probs [tokens, V] of what follows each prefix: one row, nothing of it masked."""
  row = np.full((1, ROOM), 9, np.int32)
  row[0, :len(ids)] = ids
  z = np.asarray(logits()(row), np.float64)[:len(ids)]
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def by_hand(context, continuation):
  """(sum, greedy) of ids: one forward pass over all of them."""
  found = table((*context, *continuation))[len(context) - 1:-1]
  chosen = found[np.arange(len(continuation)), list(continuation)]
  return chosen.sum(), bool((found.argmax(-1) == continuation).all())


def client(**changes):
  given = dict(key=jax.random.key(1), max_new_tokens=95, shape=conversations.Shape(
    slots=4, context=96, steps=4, chunks=(16, 64)))
  return policy.PolicyClient(CONFIG, params(), TOKENIZER, 'plain', **given | changes)


def requests(drawn=None, **changes):
  given = dict(max_length=96, score=functools.partial(
    harness.score, CONFIG, params(), tokens_per_call=128))
  return harness.Requests(drawn, TOKENIZER, **given | changes)


def texts(count=12, most=9):
  rng = random.Random(0)
  return [''.join(rng.choices(WORDS, k=rng.randint(1, most))) for _ in range(count)]


def test_split_moves_spaces_and_encodes_the_whole():
  split = functools.partial(harness.split, TOKENIZER.encode, BOS)
  encode = lambda text: tuple(TOKENIZER.encode(text))
  assert split('is it ', 'yes') == (encode('is it'), encode(' yes'))
  assert len(split('is it ', 'yes')[1]) == 1  # the piece, not a space and three letters
  assert split('is it?\n', 'no') == (encode('is it?'), encode('\nno'))
  assert split('', ' no') == ((BOS,), encode(' no'))
  assert split('  ', 'no') == ((BOS,), encode('  no'))
  # A piece over the border: the context stays as it is alone, the rest of the whole is scored.
  assert split('xa', 'bx') == (encode('xa'), encode('xabx')[2:])
  assert split('abba\n', 'no') == (encode('abba'), encode('o'))  # as the harness has it
  assert split('abba\n', ' no') == (encode('abba'), encode('\n no'))  # two pieces became one
  special = functools.partial(TOKENIZER.encode, special=True)
  assert harness.split(special, BOS, '', '<|bos|>a') == ((BOS,), encode('a'))


def test_prefix_is_bos_or_eos():
  assert requests().prefix == BOS
  bare = types.SimpleNamespace(bos_id=-1, eos_id=7)
  assert harness.Requests(None, bare, None, 8).prefix == 7


def test_fit_cuts_the_context_from_the_left():
  assert harness.fit(((1, 2, 3), (4, 5)), 4) == ((1, 2, 3), (4, 5))
  assert harness.fit(((1, 2, 3, 4), (5, 6)), 4) == ((2, 3, 4), (5, 6))
  assert harness.fit(((1, 2), (3, 4, 5, 6)), 4) == ((2,), (3, 4, 5, 6))
  for continuation in ((), (1,) * 5):
    with pytest.raises(UserError, match=r'1\.\.4 tokens \(max_length\), got'):
      harness.fit(((1,), continuation), 4)


def test_windows_are_those_of_the_harness():
  """The example in its documentation, and every token once."""
  assert harness.windows(range(10), 99, 4) == [
    ((99,), (0, 1, 2, 3)), ((3,), (4, 5, 6, 7)), ((5, 6, 7), (8, 9))]
  assert harness.windows([], 99, 4) == [] and harness.windows([5], 99, 4) == [((99,), (5,))]
  for count, size in ((1, 1), (7, 1), (7, 7), (8, 7), (30, 9)):
    found = harness.windows(range(count), 99, size)
    assert sum((b for _, b in found), ()) == tuple(range(count))
    assert all(a and len(a) + len(b) <= size + 1 for a, b in found)


def test_log_probs_are_those_of_one_forward_pass():
  found = texts()
  asked = [(c, d) for c, d in zip(found, reversed(found))] + [('', d) for d in found]
  pairs = [harness.split(TOKENIZER.encode, BOS, *r) for r in asked]
  own = requests(max_length=96)
  for (total, greedy), pair in zip(own.loglikelihood(asked), pairs, strict=True):
    want, most = by_hand(*pair)
    assert total == pytest.approx(want, abs=1e-4) and type(total) is float
    assert greedy is most
  cut = requests(max_length=12).loglikelihood([(found[0] * 3, ' yes')])[0]
  context, continuation = harness.split(TOKENIZER.encode, BOS, found[0] * 3, ' yes')
  assert len(context) > 12 and cut[0] == pytest.approx(by_hand(context[-12:], continuation)[0],
                                                       abs=1e-4)


def test_batching_and_order_change_nothing():
  rng = np.random.default_rng(0)
  pairs = [(tuple(rng.integers(4, 100, a).tolist()), tuple(rng.integers(4, 100, b).tolist()))
           for a, b in rng.integers(1, 60, (9, 2))]
  assert {max(64, 1 << (len(a) + len(b) - 2).bit_length()) for a, b in pairs} == {64, 128}
  whole = harness.score(CONFIG, params(), pairs, tokens_per_call=512)
  alone = [harness.score(CONFIG, params(), [p], tokens_per_call=64)[0] for p in pairs]
  np.testing.assert_allclose([a for a, _ in whole], [a for a, _ in alone], rtol=1e-5, atol=1e-5)
  again = harness.score(CONFIG, params(), pairs[::-1], tokens_per_call=128)[::-1]
  np.testing.assert_allclose([a for a, _ in whole], [a for a, _ in again], rtol=1e-5, atol=1e-5)
  assert harness.score(CONFIG, params(), []) == []


def test_greedy_is_what_the_client_says():
  prompts = [TOKENIZER.encode(t) for t in texts(4)]
  drawn = client().generate([policy.GenRequest(token_ids=tuple(p), max_tokens=6, temperature=0.0)
                             for p in prompts])
  pairs = [(tuple(p), c.token_ids) for p, c in zip(prompts, drawn)]
  found = harness.score(CONFIG, params(), pairs)
  assert [greedy for _, greedy in found] == [True] * 4
  for (total, _), c in zip(found, drawn):
    assert total == pytest.approx(sum(c.logprobs), abs=1e-4)
  for at in (0, -1):
    changed = []
    for context, ids in pairs:
      ids = list(ids)
      ids[at] = 5 if ids[at] != 5 else 6
      changed.append((context, tuple(ids)))
    assert [greedy for _, greedy in harness.score(CONFIG, params(), changed)] == [False] * 4


def test_rolling_is_the_sum_over_windows():
  asked = [(t,) for t in texts(6, most=12)] + [('',)]
  found = requests(max_length=5).loglikelihood_rolling(asked)
  for (text,), total in zip(asked, found, strict=True):
    ids = TOKENIZER.encode(text)
    want = sum(by_hand(*pair)[0] for pair in harness.windows(ids, BOS, 5))
    assert total == pytest.approx(want, abs=1e-4)
  assert max(len(TOKENIZER.encode(text)) for text, in asked) > 10 and found[-1] == 0
  long = requests()
  assert long.loglikelihood_rolling(asked[:1])[0] == pytest.approx(
    long.loglikelihood([('', asked[0][0])])[0][0], abs=1e-5)


def test_kwargs_of_a_task_become_those_of_the_client():
  def fields(**given):
    found = harness.sampling(given, 256)
    return found['max_tokens'], found['temperature'], found['top_p'], found['stop']

  assert fields() == (256, 0, 1, ())
  assert fields(until='x', max_gen_toks=3, top_p=0.5) == (3, 0, 1, ('x',))
  assert fields(until=['x', '', '\n'], max_new_tokens=4) == (4, 0, 1, ('x', '\n'))
  assert fields(temperature=0.5, top_p=0.9) == (256, 0.5, 0.9, ())
  assert fields(do_sample=False, temperature=0.5, num_beams=1)[1] == 0
  assert fields(**dict.fromkeys(harness.KNOWN)) == fields()
  assert fields(do_sample=True)[1] == 1 and fields(do_sample=True, temperature=0.3)[1] == 0.3
  for name, value in (('top_k', 5), ('num_beams', 4), ('repetition_penalty', 1.1)):
    with pytest.raises(UserError, match=name):
      fields(**{name: value})


def test_stop_strings_cut_across_token_borders():
  contexts = texts(5)
  own = requests(client())
  whole = own.generate_until([(c, dict(max_gen_toks=24)) for c in contexts])
  for context, text in zip(contexts, whole):
    drawn = client().generate([policy.GenRequest(
      token_ids=tuple(TOKENIZER.encode(context)), max_tokens=24, temperature=0.0)])[0]
    assert text == drawn.text
  untils = [[t[3:6], 'never in it'] for t in whole]
  assert all(len(t) > 6 for t in whole)
  asked = [(c, dict(until=u, max_gen_toks=24)) for c, u in zip(contexts, untils)]
  assert own.generate_until(asked) == [stops.cut(t, u) for t, u in zip(whole, untils)]
  assert own.generate_until([(contexts[0], dict(until=whole[0][3:6], max_gen_toks=24))])[0] == (
    stops.cut(whole[0], untils[0]))


def test_noise_belongs_to_the_request():
  kwargs = dict(do_sample=True, max_gen_toks=8)
  a, b = texts(2)
  first = requests(client(), seed=1).generate_until([(a, kwargs), (b, kwargs), (a, kwargs)])
  other = requests(client(), seed=1).generate_until([(b, kwargs), (a, kwargs), (a, kwargs)])
  assert other == [first[1], first[0], first[2]] and first[0] != first[2]
  assert requests(client(), seed=2).generate_until([(a, kwargs)])[0] != first[0]


class Recorder:
  """Says its prompt backwards, and keeps what it was asked."""

  def __init__(self):
    self.calls = []

  def generate(self, asked):
    self.calls.append(asked)
    return [Completion(TOKENIZER.decode(r.token_ids[::-1]), 'stop') for r in asked]


def test_contexts_are_cut_from_the_left_and_answers_keep_their_order(caplog):
  seen = Recorder()
  contexts = ['x' * n + 'abc' for n in (1, 40, 3, 20, 0)] + ['']
  kwargs = [dict(max_gen_toks=6, until=['\n'] if i % 2 else []) for i in range(6)]
  own = requests(seen, max_length=20, requests_per_call=2)
  found = own.generate_until(list(zip(contexts, kwargs)))
  asked = {r.token_ids for call in seen.calls for r in call}
  assert asked == {tuple(TOKENIZER.encode(c)[-14:]) or (BOS,) for c in contexts}
  for context, text in zip(contexts, found):
    assert text == TOKENIZER.decode((TOKENIZER.encode(context) or [BOS])[-14:][::-1])
  assert [len(c) for c in seen.calls] == [2, 1, 2, 1]
  assert all(len({r.stop for r in c}) == 1 for c in seen.calls)
  assert '2 of 6 contexts were cut' in caplog.text
  with pytest.raises(UserError, match='max_gen_toks must be below max_length, 20, .* got 20'):
    own.generate_until([('a', dict(max_gen_toks=20))])
  with pytest.raises(UserError, match='top_k'):
    own.generate_until([('a', dict(top_k=1))])
  with pytest.raises(UserError, match='request 0: .*context of 96'):
    requests(client(), max_length=200).generate_until([('a' * 150, dict(max_gen_toks=9))])


def test_bos_opens_contexts_where_it_is_asked_for():
  seen = Recorder()
  own = requests(seen, add_bos=True, max_gen_toks=9, score=lambda pairs: pairs)
  own.generate_until([('ab', {}), ('', {})])
  assert [r.token_ids for r in seen.calls[0]] == [(BOS, *TOKENIZER.encode('ab')), (BOS,)]
  assert own.loglikelihood([('ab', 'x'), ('', 'x')]) == [
    ((BOS, *TOKENIZER.encode('ab')), (TOKENIZER.encode('x')[0],)),
    ((BOS,), (TOKENIZER.encode('x')[0],))]
  assert own.encode('ab')[:1] != [BOS]  # a rolling window has its own


def test_chats_go_through_our_templates():
  seen = Recorder()
  own = requests(seen, template='plain', max_gen_toks=9)
  text = own.apply_chat_template([dict(role='user', content='why?')])
  assert text == 'why?<|sep|>'
  own.generate_until([(text, {})])
  sep = TOKENIZER.special['<|sep|>']
  assert seen.calls[0][0].token_ids == (*TOKENIZER.encode('why?'), sep)
  begun = [dict(role='user', content='why?'), dict(role='assistant', content='As')]
  assert own.apply_chat_template(begun, add_generation_prompt=False) == 'why?<|sep|>As'
  trims, drops = (jinja_templates.jinja_template(
    '{% for m in messages %}<{{ m.role }}>' + said + '.{% endfor %}')
    for said in ('{{ m.content | trim }}', ''))
  begun[1]['content'] = ' As '
  text = requests(template=trims).apply_chat_template(begun, add_generation_prompt=False)
  assert text == '<user>why?.<assistant>As'
  with pytest.raises(UserError, match="leaves out what an answer begins with: 'As'"):
    requests(template=drops).apply_chat_template(begun, add_generation_prompt=False)
  assert sep not in requests().encode('why?<|sep|>')  # without a template text is only text
  with pytest.raises(UserError, match='chats need a template'):
    requests().apply_chat_template(begun)


# The command, and the harness itself.


def write_run(folder, template='plain', first=''):
  """The workdir of a run: what the command reads of it."""
  with checkpoint.make_manager(str(folder / 'checkpoints')) as manager:
    checkpoint.save(manager, 1, state=dict(params=dict(policy=params())), pending=(), meta={})
  roles.write_facts(str(folder), CONFIG, TOKENIZER)
  (folder / 'config.json').write_text(json.dumps(
    dict(data=dict(template=template), init=dict(checkpoint=first))))


def write_published(folder):
  config = models.ModelConfig(vocab=320, hidden=32, layers=1, heads=4, kv_heads=2, head_dim=8,
                              inter=48, family='qwen3', context=128)
  models.save(str(folder), config, models.init(config, jax.random.key(2)))
  made = tokenizers.ByteLevelBPETokenizer()
  made.train_from_iterator(['is it yes or no?'] * 3, vocab_size=300, special_tokens=['<|eos|>'])
  made.save(str(folder / 'tokenizer.json'))


def mesh():
  return place.make_mesh({'data': 1}, jax.devices()[:1])


def test_both_kinds_of_checkpoints_are_loaded(tmp_path):
  (tmp_path / 'run').mkdir()
  write_run(tmp_path / 'run')
  found = roles.load_with_tokenizer(str(tmp_path / 'run'), mesh())
  assert (found.config, found.tokenizer, found.template) == (CONFIG, TOKENIZER, 'plain')
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found.params, params()))
  write_published(tmp_path / 'published')
  found = roles.load_with_tokenizer(str(tmp_path / 'published'), mesh())
  assert found.config.num_valid == found.tokenizer.vocab_size < found.config.vocab
  assert found.template is None
  with pytest.raises(UserError, match='came without a template'):
    cli.build_lm(found, max_length=64, slots=1, tokens_per_call=64, seed=0, chat=True)
  with pytest.raises(UserError, match='neither the workdir of a run .* nor a published'):
    roles.load_with_tokenizer(str(tmp_path), mesh())
  with pytest.raises(UserError, match='dtype: only a published checkpoint'):
    roles.load_with_tokenizer(str(tmp_path / 'run'), mesh(), 'bfloat16')
  for folder in ('run', 'published'):
    (tmp_path / folder / 'tokenizer.json').unlink()
    with pytest.raises(UserError, match=f'{folder}: tokenizer.json is missing'):
      roles.load_with_tokenizer(str(tmp_path / folder), mesh())


@pytest.mark.parametrize('came', [True, False])
def test_a_template_left_to_the_checkpoint_is_that_of_the_first_one(tmp_path, came):
  if came:
    (tmp_path / 'config.json').write_text('{}')
    (tmp_path / 'chat_template.jinja').write_text('{{ messages[0].content }}?')
  (tmp_path / 'run').mkdir()
  write_run(tmp_path / 'run', template='auto', first=str(tmp_path))
  found = roles.load_with_tokenizer(str(tmp_path / 'run'), mesh()).template
  assert (found.name if came else found) == (
    str(tmp_path / 'chat_template.jinja') if came else 'plain')


def test_a_missing_harness_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  with pytest.raises(UserError, match=r"pip install 'zppo_jax\[eval\]'"):
    harness.adapter(None, TOKENIZER, score=None, max_length=8)
  monkeypatch.setattr(cli.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'zppo_jax\[eval\]'"):
    cli.evaluate('nowhere', ['a'])


def test_conventions_equal_those_of_the_installed_harness():
  lm_eval_utils = pytest.importorskip('lm_eval.utils')
  from lm_eval.api import model
  for count in range(25):
    for size in range(1, 12):
      theirs = map(lm_eval_utils.make_disjoint_window, lm_eval_utils.get_rolling_token_windows(
        list(range(count)), 99, size, 1))
      assert harness.windows(range(count), 99, size) == [(tuple(a), tuple(b)) for a, b in theirs]
  fake = types.SimpleNamespace(backend='causal', tok_encode=TOKENIZER.encode)
  found = texts(40)
  for context, continuation in zip(found, reversed(found)):
    theirs = model.TemplateLM._encode_pair(fake, context, continuation)
    if all(theirs):  # else the harness gives up: a context of spaces, pieces over the border
      assert harness.split(TOKENIZER.encode, BOS, context, continuation) == tuple(
        map(tuple, theirs))


def write_tasks(folder, answers):
  """Three tasks over small files; `answers` are the right ones of the generating task."""
  rng = random.Random(1)
  rows = dict(
    choice=[dict(q=t, choices=rng.sample(['yes', 'no', 'abba', '3'], 3), gold=rng.randrange(3))
            for t in texts(10)],
    write=[dict(q=q, a=a) for q, a in answers], roll=[dict(text=t.strip()) for t in texts(5, 50)])
  own = dict(
    choice=dict(output_type='multiple_choice', doc_to_text='{{q}}', doc_to_target='gold',
                doc_to_choice='choices', metric_list=[dict(metric='acc'), dict(metric='acc_norm')]),
    write=dict(output_type='generate_until', doc_to_text='{{q}}', doc_to_target='{{a}}',
               generation_kwargs=dict(until=['q', '7'], max_gen_toks=9, do_sample=False),
               metric_list=[dict(metric='exact_match')]),
    roll=dict(output_type='loglikelihood_rolling', doc_to_text='', doc_to_target='{{text}}',
              metric_list=[dict(metric='byte_perplexity')]))
  for name, task in own.items():
    data = folder / f'{name}.jsonl'
    data.write_text(''.join(json.dumps(r) + '\n' for r in rows[name]))
    (folder / f'tiny_{name}.yaml').write_text(json.dumps(dict(  # JSON is YAML
      task=f'tiny_{name}', dataset_path='json', test_split='test', dataset_kwargs=dict(
        data_files=dict(test=str(data)), cache_dir=str(folder / 'cache')), **task)))
  return rows


def test_the_harness_finds_what_is_computed_by_hand(tmp_path, monkeypatch):
  pytest.importorskip('lm_eval')
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  (tmp_path / 'run').mkdir()
  write_run(tmp_path / 'run')
  asked = [t.strip() for t in texts(6)]
  drawn = requests(client()).generate_until(
    [(q, dict(until=['q', '7'], max_gen_toks=9)) for q in asked])
  right = [0, 2, 3]
  rows = write_tasks(tmp_path, [(q, a if i in right else a + '!')
                                for i, (q, a) in enumerate(zip(asked, drawn))])
  names = ['tiny_choice', 'tiny_write', 'tiny_roll']
  found = cli.evaluate(str(tmp_path / 'run'), names, include_path=str(tmp_path), max_length=90,
                       slots=4, tokens_per_call=512, log_samples=True)
  results = found['results']
  assert results['tiny_write']['exact_match,none'] == len(right) / 6
  assert [s['resps'][0][0] for s in found['samples']['tiny_write']] == drawn

  def sums(row):
    return [by_hand(*harness.split(TOKENIZER.encode, BOS, row['q'], ' ' + c))[0]
            for c in row['choices']]

  plain = [np.argmax(sums(r)) == r['gold'] for r in rows['choice']]
  normed = [np.argmax(np.divide(sums(r), [len(c) for c in r['choices']])) == r['gold']
            for r in rows['choice']]
  assert 0 < np.mean(plain) < 1
  assert results['tiny_choice']['acc,none'] == pytest.approx(np.mean(plain))
  assert results['tiny_choice']['acc_norm,none'] == pytest.approx(np.mean(normed))
  for row, seen in zip(rows['choice'], found['samples']['tiny_choice'], strict=True):
    assert seen['doc'] == row
    np.testing.assert_allclose([r[0][0] for r in seen['resps']], sums(row), atol=1e-3)
  total = sum(by_hand(*pair)[0] for r in rows['roll']
              for pair in harness.windows(TOKENIZER.encode(r['text']), BOS, 90))
  assert max(len(TOKENIZER.encode(r['text'])) for r in rows['roll']) > 90
  size = sum(len(r['text'].encode()) for r in rows['roll'])
  assert results['tiny_roll']['byte_perplexity,none'] == pytest.approx(np.exp(-total / size),
                                                                      rel=1e-5)
  chat = cli.evaluate(str(tmp_path / 'run'), names[1:2], include_path=str(tmp_path), max_length=90,
                      slots=4, tokens_per_call=512, log_samples=True, chat=True)
  assert [s['resps'][0][0] for s in chat['samples']['tiny_write']] == requests(
    client(), template='plain').generate_until(
      [(q + '<|sep|>', dict(until=['q', '7'], max_gen_toks=9)) for q in asked])


def test_the_command_writes_what_it_prints(tmp_path):
  pytest.importorskip('lm_eval')
  write_published(tmp_path / 'published')
  write_tasks(tmp_path, [('is it', 'yes')])

  def run(*args):
    env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | {'HF_HUB_OFFLINE': '1'}
    return subprocess.run(
      [sys.executable, '-m', 'experiments.evaluate_harness', f'--include_path={tmp_path}',
       f'--checkpoint={tmp_path}/published', *args], env=env, capture_output=True, text=True)

  done = run('--tasks=tiny_*', '--limit=2', f'--out={tmp_path}/out.json', '--max_length=64')
  assert done.returncode == 0, done.stderr
  assert '|tiny_choice' in done.stdout and 'byte_perplexity' in done.stdout
  found = json.loads((tmp_path / 'out.json').read_text())
  assert set(found['results']) == {'tiny_choice', 'tiny_write', 'tiny_roll'}
  assert found['n-samples']['tiny_choice'] == dict(original=10, effective=2)
  assert found['config']['model_args']['max_length'] == 64
  unknown = run('--tasks=tiny_choise,gsm8k')
  assert unknown.returncode == 2
  assert unknown.stderr.strip().splitlines()[-1] == (
    "error: --tasks: unknown tiny_choise, did you mean 'tiny_choice'?")
