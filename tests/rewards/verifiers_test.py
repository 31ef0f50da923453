"""Extraction, normalisation and one table of (gold, response, score) per verifier."""

import hypothesis
import pytest
from hypothesis import strategies as st

from zppo_jax.core.errors import RewardError
from zppo_jax.core.types import Example
from zppo_jax.rewards import answers, arithmetic, grade, slow, verifiers


def example(gold, verifier, **args):
  return Example(f'{verifier}:{gold}:{args}', (), gold, verifier, args)


EXTRACTED = [
  (r'so \boxed{7}', ('boxed',), '7'),
  (r'\boxed{2} no wait \boxed{3}', ('boxed',), '3'),
  (r'\boxed{\frac{1}{2}} done', ('boxed',), r'\frac{1}{2}'),
  (r'<think>\boxed{1}</think> \boxed{2}', ('boxed',), '2'),
  (r'<think>\boxed{1}</think> two', ('boxed',), None),
  (r'</think>a</think>\boxed{5}', ('boxed',), '5'),
  (r'\boxed{}', ('boxed',), None),
  (r'\boxed{1', ('boxed',), None),
  ('the answer is 7', ('boxed',), None),
  ('<answer> north </answer>', ('answer_tag',), 'north'),
  ('<answer>a</answer> <answer>b</answer>', ('answer_tag',), 'b'),
  ('</answer><answer>', ('answer_tag',), None),
  ('x\nAnswer: 12\n', ('answer_line',), '12'),
  ('**Final answer:** 3\nAnswer: 4', ('answer_line',), '4'),
  ('steps\n#### 72', ('hashes',), '72'),
  ('I saw 3 and then 1,024.', ('last_number',), '1,024'),
  ('no digits', ('last_number',), None),
  (' 42 ', ('whole',), '42'),
  (r'Answer: 1 \boxed{2}', ('boxed', 'answer_line'), '2'),
  ('Answer: 1', ('boxed', 'answer_line'), '1'),
  ('', ('boxed', 'answer_tag', 'answer_line', 'hashes', 'last_number', 'whole'), None),
]


@pytest.mark.parametrize('response, order, want', EXTRACTED)
def test_extract(response, order, want):
  assert answers.extract(response, order) == want


@pytest.mark.parametrize('order', ['boxed', ('box',), ('boxed', 'tag')])
def test_extract_refuses_unknown_forms(order):
  with pytest.raises(RewardError, match='boxed, answer_tag'):
    answers.extract('x', order)


NORMALISED = [
  ('$5$', '5'),
  (r'\(5\)', '5'),
  (r'\dfrac{1}{2}', r'\frac{1}{2}'),
  (r'\frac12', r'\frac{1}{2}'),
  (r'\frac1{72}', r'\frac{1}{72}'),
  (r'\frac{72}1', r'\frac{72}{1}'),
  (r'\sqrt2', r'\sqrt{2}'),
  ('x^{2}', 'x^2'),
  (r'\text{north  west}.', 'north west'),
  ('1,234,567', '1234567'),
  ('1{,}000', '1000'),
  ('1,23', '1,23'),
  (r'90^{\circ}', r'90^\circ'),
  ('90°', r'90^\circ'),
  (r'50\%', '50%'),
  (r'\left( 1 , 2 \right)', '(1,2)'),
  ('{5}', '5'),
  ('\u22123', '-3'),
  ('+3', '3'),
  (r'2\cdot 3', '2*3'),
  (r'1,\cdots', r'1,\cdots'),
  (r'\leftarrow', r'\leftarrow'),
]


@pytest.mark.parametrize('raw, want', NORMALISED)
def test_normalise(raw, want):
  assert answers.normalise(raw) == want
  assert answers.normalise(want) == want


EXACT = [  # verifier, gold, answer, score, args
  ('exact', 'abC', 'abC', 1, {}),
  ('exact', 'abC', 'abc', 0, {}),
  ('exact', 'a b', 'ab', 0, {}),
  ('exact_norm', 'The red Cat.', 'red cat', 1, {}),
  ('exact_norm', 'red cat', 'a red, cat!', 1, {}),
  ('exact_norm', 'A', 'a', 1, {}),
  ('exact_norm', 'A', 'b', 0, {}),
  ('exact_norm', '-3', '3', 0, {}),
  ('exact_norm', 'red', 'blue', 0, {}),
  ('exact_norm', 'red', '!', 0, {}),
  ('numeric_exact', '12', '12.0', 1, {}),
  ('numeric_exact', '1234', '1,234', 1, {}),
  ('numeric_exact', '1/2', '.5', 1, {}),
  ('numeric_exact', '1/2', r'\frac{1}{2}', 1, {}),
  ('numeric_exact', '1/3', '.333', 0, {}),
  ('numeric_exact', '50', '50%', 1, {}),
  ('numeric_exact', '5', '$5', 1, {}),
  ('numeric_exact', '5', '5 cm', 0, {}),
  ('numeric_exact', '5', '5 cm', 1, {'units': ('cm', 'm')}),
  ('numeric_exact', '-7', '\u22127', 1, {}),
  ('numeric_exact', '1500', '1.5e3', 1, {}),
  ('numeric_exact', '1', '1e999999999', 0, {}),
  ('numeric_exact', '7', '3+4', 0, {}),
  ('numeric_exact', '7', '1/0', 0, {}),
  ('numeric_exact', '7', 'seven', 0, {}),
  ('mod_equal', '3', '3', 1, {'modulus': 7}),
  ('mod_equal', '3', '10', 0, {'modulus': 7}),
  ('mod_equal', '3', '-4', 0, {'modulus': 7}),
  ('mod_equal', '3', '4', 0, {'modulus': 7}),
  ('mod_equal', '3', '3.5', 0, {'modulus': 7}),
  ('countdown', '', '(1+2)*3', 1, {'numbers': (1, 2, 3), 'target': 9}),
  ('countdown', '', '(1+2)*3 = 9', 1, {'numbers': (1, 2, 3), 'target': 9}),
  ('countdown', '', '(1+2)*3 = 8', 0, {'numbers': (1, 2, 3), 'target': 9}),
  ('countdown', '', r'3 \times (2 + 1)', 1, {'numbers': (1, 2, 3), 'target': 9}),
  ('countdown', '', '8/(3-8/3)', 1, {'numbers': (3, 3, 8, 8), 'target': 24}),
  ('countdown', '', '3*3', 0, {'numbers': (1, 2, 3), 'target': 9}),
  ('countdown', '', '3*3', 1, {'numbers': (3, 3, 4), 'target': 9}),
  ('countdown', '', '3*3', 0, {'numbers': (3, 3, 4), 'target': 9, 'use_all': True}),
  ('countdown', '', '9', 0, {'numbers': (3, 3), 'target': 9}),
  ('countdown', '', '3**2', 0, {'numbers': (3, 2), 'target': 9}),
  ('countdown', '', '9//1', 0, {'numbers': (9, 1), 'target': 9}),
  ('countdown', '', 'abs(9)', 0, {'numbers': (9,), 'target': 9}),
  ('countdown', '', 'x', 0, {'numbers': (9,), 'target': 9}),
  ('countdown', '', '9.0', 0, {'numbers': (9,), 'target': 9}),
  ('countdown', '', 'True', 0, {'numbers': (1,), 'target': 1}),
  ('countdown', '', '1/(1-1)', 0, {'numbers': (1, 1, 1), 'target': 1}),
  ('countdown', '', '(' * 200, 0, {'numbers': (1,), 'target': 1}),
  ('countdown', '', '-' * 250 + '1', 0, {'numbers': (1,), 'target': 2}),
  ('countdown', '', '9**9**9', 0, {'numbers': (9, 9, 9), 'target': 1}),
  ('choice', 'B', 'b', 1, {'choices': ('Rome', 'Paris')}),
  ('choice', 'B', '(B)', 1, {'choices': ('Rome', 'Paris')}),
  ('choice', 'B', 'B.', 1, {'choices': ('Rome', 'Paris')}),
  ('choice', 'B', 'paris', 1, {'choices': ('Rome', 'Paris')}),
  ('choice', 'Paris', 'B) Paris', 1, {'choices': ('Rome', 'Paris')}),
  ('choice', 'B', 'B: Rome', 0, {'choices': ('Rome', 'Paris')}),
  ('choice', 'B', 'A', 0, {'choices': ('Rome', 'Paris')}),
  ('choice', 'B', 'C', 0, {'choices': ('Rome', 'Paris')}),
  ('choice', 'B', 'A or B', 0, {'choices': ('Rome', 'Paris')}),
  ('choice', 'C', r'\text{C}', 1, {}),
  ('set_equal', '1, 2, 3', r'\{3, 1, 2\}', 1, {}),
  ('set_equal', 'red, blue', 'blue and red', 0, {}),
  ('set_equal', 'red, blue', 'Blue, and red', 1, {}),
  ('set_equal', '1/2; 3', '3; 0.5', 1, {'separator': ';'}),
  ('set_equal', '1, 2', '1', 0, {}),
  ('set_equal', '1, 2', ',', 0, {}),
  ('regex', '', 'ab12', 1, {'pattern': r'[a-z]+\d+'}),
  ('regex', '', 'ab12 ', 1, {'pattern': r'[a-z]+\d+'}),
  ('regex', '', '12ab', 0, {'pattern': r'[a-z]+\d+'}),
  ('regex', 'a+', 'aaa', 1, {}),
  ('math', '7', '7', 1, {}),
  ('math', '7', '8', 0, {}),
  ('math', '0.5', '1/2', 1, {}),
  ('math', r'\frac12', '0.50', 1, {}),
  ('math', '1/3', '.333', 0, {}),
  ('math', '1/3', '.3333333333', 1, {}),
  ('math', '5', '4.99999999', 0, {}),
  ('math', '1000', '1,000', 1, {}),
  ('math', '50', r'50\%', 1, {}),
  ('math', '50\\%', '50', 1, {}),
  ('math', '50%', '0.5', 1, {}),
  ('math', '50%', '5', 0, {}),
  ('math', '90', r'90^\circ', 1, {}),
  ('math', '90°', '90', 1, {}),
  ('math', '90°', '80', 0, {}),
  ('math', 'x=5', '5', 1, {}),
  ('math', '5', 'x = 5', 1, {}),
  ('math', '(1,2)', '(1, 2.0)', 1, {}),
  ('math', '(1,2)', '(2,1)', 0, {}),
  ('math', '(1,2)', '[1,2]', 0, {}),
  ('math', '(1,2)', '(1,2,3)', 0, {}),
  ('math', r'\text{North}', 'north', 1, {}),
  ('math', 'north', 'thorn', 0, {}),
  ('math', 'north', '5', 0, {}),
  ('math', 'x+1', '9^{9^{9^9}}', 0, {}),
  ('math', 'x+1', '9**9**9', 0, {}),
  ('math', 'x+1', '2^{99999}', 0, {}),
  ('math', 'x+1', '99999!', 0, {}),
]


@pytest.mark.parametrize('verifier, gold, answer, score, args', EXACT)
def test_inline_verdicts(verifier, gold, answer, score, args):
  row = example(gold, verifier, **args)
  judged = verifiers.get(verifier).begin(answers.extract(f'\\boxed{{{answer}}}', ('boxed',)), row)
  assert isinstance(judged, verifiers.VerifyResult)  # no process needed
  assert judged.score == score, judged
  assert verifiers.VERIFIERS[verifier](answer, row).score == 0  # no box


MATH = [  # decided by math-verify in a worker
  (r'\sqrt{8}', r'2\sqrt2', 1),
  ('x^2+2x+1', '(x+1)^2', 1),
  ('x^2+2x+1', '(x-1)^2', 0),
  (r'\{1,2\}', r'\{2,1\}', 1),
  ('5>x', 'x<5', 1),
  (r'3\frac{1}{2}', r'\frac{7}{2}', 1),
  ('2^{10}', '1024', 1),
  (r'\pi', '3.14', 0),
  (r'2\pi', '2π', 1),
  (r'(\sqrt8, 3)', r'(2\sqrt{2}, 3)', 1),
  (r'(\sqrt8, 3)', r'(2\sqrt{2}, 4)', 0),
  (r'\infty', 'inf', 1),
  ('5', r'5\text{ cm}', 1),
  ('2', '2 or 3', 0),
  ('x+1', '}{', 0),
  ('x+1', r'\frac{', 0),
  ('x+1', "__import__('os').system('true')", 0),
  (r'\begin{pmatrix}1\\2\end{pmatrix}', r'\begin{pmatrix} 1 \\ 2 \end{pmatrix}', 1),
]


@pytest.fixture(scope='module')
def grader():
  with grade.Grader(deadline_s=10.0) as value:
    yield value


def test_math_verify_verdicts(grader):
  rows = [example(gold, 'math', order=('whole',)) for gold, _, _ in MATH]
  rewards, results = grader.grade([answer for _, answer, _ in MATH], rows)
  wrong = [(m, r) for m, reward, r in zip(MATH, rewards, results) if reward != m[2]]
  assert not wrong


def test_zppo_retry_drops_degree_and_percent_signs_from_both_sides(monkeypatch):
  seen = []
  monkeypatch.setattr(slow, '_equal', lambda gold, answer: seen.append((gold, answer)))
  assert slow.math_equal((('a%+b^\\circ', 'c\\%'),)) == 0.0
  assert seen == [('a%+b^\\circ', 'c\\%'), ('a+b', 'c')]
  seen.clear()
  assert slow.math_equal((('a', 'b'),)) == 0.0
  assert seen == [('a', 'b')]  # nothing to remove: no second attempt


def test_signs_alone_are_not_an_answer():
  assert arithmetic.compare('%', '°') == (None, (('%', r'^\circ'),))


def test_math_never_reads_free_text():
  result = verifiers.VERIFIERS['math']('the answer is 7', example('7', 'math'))
  assert (result.score, result.parsed, result.reason) == (0.0, None, 'no answer')


def test_over_long_answers_are_refused_before_parsing():
  row = example('1' * 300, 'math')
  result = verifiers.VERIFIERS['math']('\\boxed{' + '1' * 300 + '}', row)
  assert result.score == 0 and '256' in result.reason


@pytest.mark.parametrize(
  'text', ['9^{9^9}', '9**9**9', '(9^9)^9', '2^{1001}', '10^{-99999}', '3!!']
)
def test_danger_is_seen(text):
  assert arithmetic.danger(text)


@pytest.mark.parametrize(
  'text', ['x^2', '2^{10}', 'x^{y^2}', r'e^{2\pi}', '10!', 'a*b', '10^{1000}']
)
def test_harmless_powers_pass(text):
  assert arithmetic.danger(text) is None


ANY_TEXT = st.one_of(
  st.text(max_size=60),
  st.binary(max_size=60).map(lambda raw: raw.decode('latin-1')),
  st.text(alphabet='0123456789+-*/^%=(){}[],.!\\boxedfrac$ ', max_size=60),
)
INLINE_ARGS = {
  'modulus': 7, 'numbers': (1, 2, 3), 'target': 6, 'choices': ('red', 'blue'), 'pattern': 'a+b',
  'dataset': 'gcd', 'entry': {},
}  # fmt: skip


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(ANY_TEXT)
def test_total_on_any_string(text):
  for name, verifier in verifiers.VERIFIERS.items():
    for order in (('boxed',), tuple(answers.FORMS)):
      row = example('6', name, order=order, **INLINE_ARGS)
      for response in (text, f'\\boxed{{{text}}}'):
        judged = verifier.begin(verifier.read(response, row), row)
        assert isinstance(judged, verifiers.Pending) or 0.0 <= judged.score <= 1.0


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(ANY_TEXT)
def test_normalising_is_total_and_equal_texts_are_equal(text):
  answers.canonical(text)
  if answers.normalise(text):
    assert arithmetic.compare(text, text)[0] is True


def test_math_in_the_pool_is_total(grader):
  texts = [
    '\\frac',
    '\\sqrt[',
    '^',
    '\\begin{matrix}',
    '{}{}',
    '\\int_',
    'a=b=c',
    '1..2',
    '\x00',
    ';',
  ]
  rewards, _ = grader.grade(texts, [example('x+1', 'math', order=('whole',))] * len(texts))
  assert not rewards.any()


def test_reasoning_gym(grader):
  import reasoning_gym

  entry = reasoning_gym.create_dataset('prime_factorization', seed=1, size=1)[0]
  row = example(entry['answer'], 'reasoning_gym', dataset='prime_factorization', entry=entry)
  rewards, results = grader.grade(
    [f'\\boxed{{{a}}}' for a in (entry['answer'], 'x', '1')], [row] * 3
  )
  assert list(rewards) == [1, 0, 0], results


def test_reasoning_gym_partial_credit():
  import reasoning_gym

  entry = reasoning_gym.create_dataset('chain_sum', seed=1, size=1)[0]
  assert slow.reasoning_gym_score('chain_sum', entry, entry['answer'], False) == 1.0
  partial = slow.reasoning_gym_score('chain_sum', entry, f'{entry["answer"]} or so', True)
  assert 0 <= partial < 1
  assert slow.reasoning_gym_score('chain_sum', entry, f'{entry["answer"]} or so', False) == 0.0


def test_unknown_verifier_suggests():
  with pytest.raises(RewardError, match="'maths': did you mean 'math'.*countdown"):
    verifiers.get('maths')


@pytest.mark.parametrize('name', ['mod_equal', 'countdown', 'reasoning_gym'])
def test_missing_argument_is_named(name):
  with pytest.raises(RewardError, match=f'{name}.*needs verifier_args'):
    verifiers.VERIFIERS[name]('\\boxed{1}', example('1', name))


def test_bad_pattern_is_named():
  with pytest.raises(RewardError, match='regex'):
    verifiers.VERIFIERS['regex']('\\boxed{1}', example('1', 'regex', pattern='('))
