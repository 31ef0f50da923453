import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from fractions import Fraction

import pytest

from zppo_jax.core import text
from zppo_jax.data.tasks import arithmetic, common, countdown, modmath, sources

SPECS = {
  'arithmetic': {'name': 'arithmetic'},
  'arithmetic_tree': {
    'name': 'arithmetic', 'digits': 1, 'terms': 4, 'operators': '+-*/', 'parentheses': True,
  },
  'arithmetic_positive': {'name': 'arithmetic', 'terms': 3, 'operators': '+-*/', 'negative': False},
  'modmath': {'name': 'modmath'},
  'modmath_all': {'name': 'modmath', 'modulus': 30, 'kinds': modmath.KINDS, 'moduli': 3},
  'countdown': {'name': 'countdown'},
  'countdown_all': {'name': 'countdown', 'use_all': True, 'operators': '+-*/', 'largest': 30},
}  # fmt: skip
# First 12 hex digits over the first 50 items: a change of any text must raise the task's version.
GOLDEN = {
  'arithmetic': '71a9e179100f',
  'arithmetic_tree': '39a9664a534e',
  'arithmetic_positive': 'e48bd16454d9',
  'modmath': '0f41151e4c2b',
  'modmath_all': '31b9df67308b',
  'countdown': '8bb6059ef9f3',
  'countdown_all': '8fa6b5b42fdd',
}


def as_json(example):
  return json.dumps(dataclasses.asdict(example), sort_keys=True)


def hash_of(source, count=50):
  """Of what the hashes were made of: without the fields of dialogues, which must be empty."""
  rows = []
  for i in range(count):
    row = json.loads(as_json(source[i]))
    assert row.pop('dialogue') == []
    row['messages'] = [{k: m[k] for k in ('role', 'content')} for m in row['messages']]
    rows.append(json.dumps(row, sort_keys=True))
  joined = '\n'.join(rows)
  return hashlib.blake2b(joined.encode(), digest_size=6).hexdigest()


def build(name, **kwargs):
  return sources.build_source(SPECS[name] | kwargs)


def numbers_right(example, answer):
  """Is the answer right? Worked out here, apart from the library's own solvers."""
  question = example.messages[0].content
  if example.verifier == 'countdown':
    args = example.verifier_args
    used = sorted(int(n) for n in re.findall(r'\d+', answer))
    spare = list(args['numbers'])
    for n in used:
      if n not in spare:
        return False
      spare.remove(n)
    value = eval(re.sub(r'(\d+)', r'Fraction(\1)', answer), {'Fraction': Fraction})
    return value == args['target'] and not (args.get('use_all') and spare)
  if 'mod' in question:
    return modmath.solve(question) == int(answer)
  return eval(re.sub(r'(\d+)', r'Fraction(\1)', question), {'Fraction': Fraction}) == int(answer)


@pytest.mark.parametrize('name', SPECS)
@pytest.mark.parametrize('split', ['train', 'ood'])
def test_answers_agree_with_the_solver(name, split):
  source = build(name, split=split)
  for i in range(200 if split == 'train' else 40):
    example = source[i]
    assert numbers_right(example, example.answer), example
    assert text.last_boxed(example.solution) == example.answer
    question = example.messages[0].content
    assert question == question.lower() and question.isascii()
    assert 0 <= example.meta['difficulty'] <= 1


@pytest.mark.parametrize('name', ['countdown', 'countdown_all'])
def test_countdown_brute_force_finds_an_answer(name):
  source = build(name)
  for i in range(30):
    args = source[i].verifier_args
    found = countdown.solve(**args)
    assert found and countdown.check(found, **args)


@pytest.mark.parametrize('name', SPECS)
def test_distractors_are_wrong(name):
  source = build(name)
  for i in range(100):
    example, wrong = source[i], source.distractor(i)
    assert wrong != example.answer and wrong == source.distractor(i)
    if example.verifier == 'countdown':
      assert not countdown.check(wrong, **example.verifier_args)
    elif example.verifier == 'mod_equal':
      assert (int(wrong) - int(example.answer)) % example.verifier_args['modulus']
    else:
      assert int(wrong) != int(example.answer)


@pytest.mark.parametrize('name', ['arithmetic', 'modmath', 'countdown'])
def test_small_questions_are_short(name):
  source = build(name)
  assert max(len(source[i].messages[0].content) for i in range(300)) <= 60


@pytest.mark.parametrize('name', SPECS)
def test_an_item_depends_on_nothing_but_its_index(name):
  scan = build(name, size=1001)
  items = [as_json(scan[i]) for i in range(20)]
  other = build(name, size=50)
  assert [as_json(other[i]) for i in reversed(range(20))] == items[::-1]
  assert as_json(build(name, size=5000)[1000]) == as_json(scan[1000]) == as_json(scan[-1])
  assert as_json(build(name, seed=1)[0]) != items[0]


@pytest.mark.parametrize('name', SPECS)
def test_golden(name):
  assert hash_of(build(name)) == GOLDEN[name]


def test_a_dialogue_asks_a_calculator_and_reads_its_answer():
  source = build('arithmetic_tree', tool=True)
  for i in range(50):
    ask, told, answer = source[i].dialogue
    call, = ask.tool_calls
    value = Fraction(eval(call.arguments['expression'].replace('/', '//')))
    assert call.name == told.name == 'calculator' and told.tool_call_id == call.id
    assert str(value) == told.content == source[i].answer
    assert answer.content == f'\\boxed{{{source[i].answer}}}'
    assert dataclasses.replace(source[i], dialogue=()) == build('arithmetic_tree')[i]


def test_two_processes_agree():
  program = (
    'import json, dataclasses\n'
    'from zppo_jax.data.tasks import sources\n'
    f'for spec in {list(SPECS.values())!r}:\n'
    '  example = sources.build_source(spec)[7]\n'
    '  print(json.dumps(dataclasses.asdict(example), sort_keys=True))\n'
  )
  result = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert result.stdout.splitlines() == [as_json(build(name)[7]) for name in SPECS]


def test_splits_share_no_content():
  sizes = {'train': 7000, 'validation': 1000, 'test': 1000, 'ood': 1000}
  seen = {}
  for split, size in sizes.items():
    source = build('arithmetic', split=split, size=size)
    for i in range(size):
      content = source.task.canonical(source.problem(i))
      assert seen.setdefault(content, split) == split
  assert set(seen.values()) == set(sizes)


@pytest.mark.parametrize('name', ['modmath_all', 'countdown'])
def test_splits_share_no_content_in_other_tasks(name):
  contents = {}
  for split in common.SPLITS:
    source = build(name, split=split)
    contents[split] = {source.task.canonical(source.problem(i)) for i in range(150)}
  assert sum(map(len, contents.values())) == len(set().union(*contents.values()))


def test_canonical_joins_equal_problems():
  def canonical(question):
    return arithmetic.canonical(common.Problem(question, '', '', '', {}))

  assert canonical('3+5-2') == canonical('5-2+3')
  assert canonical('2*3+4') == canonical('4+3*2')
  assert len({canonical(q) for q in ('3-5', '5-3', '3/5', '3*5', '3-(5-2)', '3-5-2')}) == 6


def test_uid_is_a_content_hash():
  source = build('arithmetic')
  uids = {}
  for i in range(300):
    example = source[i]
    content = (example.messages[0].content, example.answer)
    assert uids.setdefault(example.uid, content) == content
    assert re.fullmatch(r'[0-9a-f]{16}', example.uid)
  test = build('arithmetic', split='test')
  assert not {test[i].uid for i in range(50)} & set(uids)


def test_too_small_a_space_says_so(monkeypatch):
  monkeypatch.setattr(common, 'split_of', lambda content: 'train')
  with pytest.raises(ValueError, match="no problem for split 'test'"):
    build('modmath', split='test')[0]


@pytest.mark.parametrize(
  'expression', ['2**9', '__import__("os")', 'x', '1.5', 'f(1)', '1+', '', '1//2', '0x10', '1_0']
)
def test_countdown_check_refuses_other_text(expression):
  assert not countdown.check(expression, [1, 2, 9, 10, 16], 16)


def test_countdown_check_counts_numbers():
  assert countdown.check('(3+5)*2', [2, 3, 5], 16)
  assert countdown.check('8*2', [2, 3, 8], 16)
  assert not countdown.check('8*2', [2, 3, 8], 16, use_all=True)
  assert not countdown.check('8+8', [8, 3], 16)
  assert not countdown.check('3/0', [3, 0], 16)
  assert not countdown.check('(' * 5000 + '1' + ')' * 5000, [1], 1)


@pytest.mark.parametrize(
  'spec, message',
  [
    ({'name': 'arithmetik'}, "closest is 'arithmetic'.*countdown"),
    ({'name': 'arithmetic', 'digit': 2}, "closest is 'digits'"),
    ({'name': 'arithmetic', 'digits': 0, 'terms': 1}, 'digits 0 .*terms 1'),
    ({'name': 'arithmetic', 'operators': '/'}, 'operators'),
    ({'name': 'modmath', 'kinds': ('lin',)}, 'kinds'),
    ({'name': 'countdown', 'count': 9}, 'count 9'),
    ({'name': 'arithmetic', 'split': 'dev'}, "split 'dev'.*validation"),
    ({'name': 'arithmetic', 'size': 0}, 'size 0'),
    ({}, "needs 'name'"),
    ({'mix': [], 'weights': []}, 'needs sources'),
    ({'mix': [{'name': 'arithmetic'}], 'weights': [0]}, 'not all 0'),
    ({'mix': [{'name': 'arithmetic'}], 'weights': [-1]}, '>= 0'),
    ({'mix': [{'name': 'arithmetic'}], 'weight': [1]}, "closest is 'weights'"),
    ({'path': 'x.jsonl', 'skema': 'auto'}, "closest is 'schema'"),
  ],
)
def test_bad_specs(spec, message):
  with pytest.raises(ValueError, match=message):
    sources.build_source(spec)


@pytest.mark.parametrize('index', [10, -11])
def test_index_out_of_range(index):
  with pytest.raises(IndexError, match='10 examples'):
    build('arithmetic', size=10)[index]


def test_mix_without_weights_holds_every_example_once():
  parts = [build('arithmetic', size=7), build('countdown', size=5), build('modmath', size=3)]
  mixed = sources.mix(parts)
  assert [e.uid for e in map(mixed.__getitem__, range(len(mixed)))] == [
    part[i].uid for part in parts for i in range(len(part))
  ]
  assert mixed.distractor(8) == parts[1].distractor(1)


def test_mix_follows_its_weights():
  parts = [build('arithmetic', size=300), build('countdown', size=100)]
  mixed = sources.mix(parts, [3, 1])
  assert len(mixed) == 400
  places = [mixed.locate(i) for i in range(400)]
  assert len(set(places)) == 400  # nothing repeats before a source is used up
  for start in range(0, 400, 40):
    assert sum(source == 0 for source, _ in places[start : start + 40]) == 30
  long = sources.mix(parts, [3, 1], size=2500)
  rows = [row for source, row in map(long.locate, range(2500)) if source == 1]
  assert rows[:300] == [*range(100)] * 3
