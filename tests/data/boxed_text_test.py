import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo_jax.core import text

CASES = [
  (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
  (r'first \boxed{1}, then \fbox{2}', '2'),
  (r'so \boxed 7.', '7'),
  (r'$\boxed 3.5$', '3.5'),
  (r'\boxed\frac{1}{2} done', r'\frac{1}{2}'),
  (r'\boxed{\boxed{3}}', '3'),
  (r'\boxed{\{1,2\}}', r'\{1,2\}'),
  (r'\boxed{ 1 } \boxed{', '1'),
  (r'{ \boxed{5}', '5'),
  (r'\boxed{}', ''),
  (r'\boxed{1', None),
  (r'\boxedx{3}', None),
  ('no box', None),
  ('', None),
]


@pytest.mark.parametrize('source, expected', CASES)
def test_last_boxed(source, expected):
  assert text.last_boxed(source) == expected


def test_strip_boxed_keeps_the_rest():
  assert text.strip_boxed(r'a \boxed{1+\fbox{2}} b \boxed 7. \boxed{') == r'a 1+2 b 7. \boxed{'


@given(st.text(alphabet='\\boxed{}f 7\n', max_size=80))
def test_total_and_consistent(source):
  found = text.last_boxed(source)
  assert found is None or found in source
  assert len(text.strip_boxed(source)) <= len(source)


def test_linear_on_hostile_text():
  assert text.last_boxed('\\boxed{' * 50_000) is None
  assert text.last_boxed('\\boxed{' * 50_000 + '1' + '}' * 50_000) == '1'
