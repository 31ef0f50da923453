"""Rule-based verifiers: response text and question in, one score out.

A verifier reads one answer out of the response (`answers.extract`; `verifier_args['order']` names
the allowed forms, a box by default) and judges it. It is total: any string gets a score. Rewards
are binary, except `reasoning_gym` with `partial`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from zppo_jax.core.errors import RewardError
from zppo_jax.core.types import Example
from zppo_jax.rewards import answers, arithmetic, pool, slow


@dataclasses.dataclass(frozen=True)
class VerifyResult:
  """Score in [0, 1]; the answer as it was read, None if there was none; why, in a few words."""

  score: float
  parsed: str | None
  reason: str

  @property
  def unjudged(self) -> bool:
    """Whether the judge was killed or failed: the score of 0 says nothing about the answer."""
    return self.reason in ('timeout', 'died') or self.reason.startswith('error: ')


@dataclasses.dataclass(frozen=True)
class Pending:
  """A judgement that only a killable process may make; the call returns the score."""

  call: pool.Call
  parsed: str

  def finish(self, outcome: pool.Outcome) -> VerifyResult:
    """The result, once the pool has answered; anything but 'ok' scores 0."""
    if outcome.reason != 'ok':
      return VerifyResult(0.0, self.parsed, outcome.reason)
    return _result(outcome.value, self.parsed)


def _result(score: float | bool, parsed: str, reason: str | None = None) -> VerifyResult:
  score = float(score)
  return VerifyResult(score, parsed, reason or ('correct' if score == 1.0 else 'wrong'))


@dataclasses.dataclass(frozen=True)
class Verifier:
  """`judge(answer, example)` behind the extraction; calling it grades one response.

  A call that needs the pool starts a process of its own (about a second): batches go through
  `grade.Grader`.
  """

  judge: Callable[[str, Example], VerifyResult | Pending]

  def __call__(self, response: str, example: Example) -> VerifyResult:
    judged = self.begin(self.read(response, example), example)
    return judged.finish(pool.run_once(judged.call)) if isinstance(judged, Pending) else judged

  def read(self, response: str, example: Example) -> str | None:
    """The answer in `response`, in the forms that the question allows."""
    return answers.extract(response, example.verifier_args.get('order', answers.BOXED))

  def begin(self, answer: str | None, example: Example) -> VerifyResult | Pending:
    """The judgement of an extracted answer; None and over-long answers score 0."""
    if answer is None:
      return VerifyResult(0.0, None, 'no answer')
    if len(answer) > answers.MAX_CHARS:
      return VerifyResult(0.0, answer, f'answer longer than {answers.MAX_CHARS} characters')
    return self.judge(answer, example)


def _arg(example: Example, name: str) -> Any:
  if name not in example.verifier_args:
    raise RewardError(
      f'verifier {example.verifier!r} needs verifier_args[{name!r}] (question {example.uid})'
    )
  return example.verifier_args[name]


def judge_exact(answer: str, example: Example) -> VerifyResult:
  """Equal strings, case and inner spaces included."""
  return _result(answer.strip() == example.answer.strip(), answer)


_PUNCTUATION = re.compile(r'[^\w\s.+-]|_|(?<!\d)\.|\.(?!\d)|[-+](?!\d)')


def fold(text: str) -> str:
  """Lower case without punctuation, articles and repeated spaces; inner signs of numbers stay."""
  text = answers.normalise(text).casefold()
  words = _PUNCTUATION.sub(' ', text).split()
  return ' '.join([w for w in words if w not in ('a', 'an', 'the')] or words)


def judge_exact_norm(answer: str, example: Example) -> VerifyResult:
  """Equal after folding case, articles, punctuation and white space; never equal when empty."""
  folded = fold(answer)
  return _result(bool(folded) and folded == fold(example.answer), answer)


_SCIENTIFIC = re.compile(r'([-+]?(?:\d+(?:\.\d*)?|\.\d+))[eE]([-+]?\d{1,2})')


def to_number(text: str, units: tuple[str, ...] = ()) -> Fraction | None:
  """The exact value of an integer, decimal, ratio or power-of-ten notation; None for anything else.

  Thousands separators, currency and percent signs and one of `units` at the end are dropped.
  """
  text = answers.normalise(text).removesuffix('%').strip()
  for unit in sorted(units, key=len, reverse=True):
    if text.casefold().endswith(unit.casefold()):
      text = answers.normalise(text[: -len(unit)])
      break
  number = answers.plain_number(text)
  if number:
    return number[0]
  scientific = _SCIENTIFIC.fullmatch(text)
  if not scientific:
    return None
  return Fraction(scientific[1]) * Fraction(10) ** int(scientific[2])


def judge_numeric_exact(answer: str, example: Example) -> VerifyResult:
  """Equal as exact numbers; args `units`: endings to drop from both sides."""
  units = tuple(example.verifier_args.get('units', ()))
  value, gold = to_number(answer, units), to_number(example.answer, units)
  if value is None:
    return _result(0.0, answer, 'not a number')
  return _result(value == gold, answer)


def judge_mod_equal(answer: str, example: Example) -> VerifyResult:
  """The residue itself: 0 <= answer < args `modulus` and equal to the gold modulo it.

  A congruent number outside that range is the unreduced work, which would pass without the task.
  """
  modulus = int(_arg(example, 'modulus'))
  value, gold = to_number(answer), to_number(example.answer)
  if value is None or value.denominator != 1:
    return _result(0.0, answer, 'not an integer')
  reduced = 0 <= value < modulus
  return _result(gold is not None and reduced and (value - gold) % modulus == 0, answer)


def judge_countdown(answer: str, example: Example) -> VerifyResult:
  """An expression over args `numbers`, each used at most once (exactly once if args `use_all`),
  whose exact value is args `target`; an ending `= target` is allowed."""
  numbers, target = list(_arg(example, 'numbers')), _arg(example, 'target')
  use_all = bool(example.verifier_args.get('use_all', False))
  reason = arithmetic.check_expression(answer, numbers, target, use_all=use_all)
  return _result(reason is None, answer, reason)


_LETTER = re.compile(r'\(?([A-Za-z])\)?\s*[.:)]?')
_LETTER_AND_TEXT = re.compile(r'\(?([A-Za-z])\s*[.:)]\s*(.+)', re.DOTALL)


def to_choice(text: str, choices: tuple[str, ...]) -> str | None:
  """The upper-case letter that `text` chooses, by letter, by option text or by both, else None.

  A letter beyond the options, or one whose text is that of another option, is None.
  """
  text = answers.normalise(text)
  folded = [fold(choice) for choice in choices]
  letter = _LETTER.fullmatch(text)
  if letter and (not choices or ord(letter[1].upper()) - ord('A') < len(choices)):
    return letter[1].upper()
  if fold(text) and folded.count(fold(text)) == 1:
    return chr(ord('A') + folded.index(fold(text)))
  both = _LETTER_AND_TEXT.fullmatch(text)
  if not both:
    return None
  index = ord(both[1].upper()) - ord('A')
  agrees = not choices or (index < len(choices) and fold(both[2]) == folded[index])
  return both[1].upper() if agrees else None


def judge_choice(answer: str, example: Example) -> VerifyResult:
  """The same option, by letter or by text; args `choices`: the option texts in order."""
  choices = tuple(str(choice) for choice in example.verifier_args.get('choices', ()))
  chosen = to_choice(answer, choices)
  if chosen is None:
    return _result(0.0, answer, 'no option')
  return _result(chosen == to_choice(example.answer, choices), answer)


def to_set(text: str, separator: str) -> frozenset[Fraction | str]:
  """The elements of a list or set, as numbers where they are numbers, else folded words."""
  text = re.sub(r'^(?:\\?[{\[(])|(?:\\?[}\])])$', '', text.strip())
  parts = (re.sub(r'^and\b', '', part.strip()) for part in text.split(separator))
  keys = (to_number(part) if to_number(part) is not None else fold(part) for part in parts)
  return frozenset(key for key in keys if key != '')


def judge_set_equal(answer: str, example: Example) -> VerifyResult:
  """The same elements in any order; args `separator` (a comma by default)."""
  separator = example.verifier_args.get('separator', ',')
  found = to_set(answer, separator)
  return _result(bool(found) and found == to_set(example.answer, separator), answer)


_NESTED_REPEAT = re.compile(r'[+*}]\)*[+*{]')  # may backtrack without end


def judge_regex(answer: str, example: Example) -> VerifyResult | Pending:
  """The whole answer matches args `pattern` (the gold answer where there is none)."""
  pattern = example.verifier_args.get('pattern', example.answer)
  try:
    compiled = re.compile(pattern)
  except re.error as error:
    raise RewardError(f'regex {pattern!r} of question {example.uid}: {error}') from error
  if _NESTED_REPEAT.search(pattern):
    return Pending(pool.Call(slow.full_match, (pattern, answer)), answer)
  return _result(compiled.fullmatch(answer) is not None, answer)


def judge_math(answer: str, example: Example) -> VerifyResult | Pending:
  """Equal as mathematics (arXiv:2606.18216): own normaliser first, then math-verify in the pool.

  What fails is tried once more without degree and percent signs on both sides.
  """
  equal, pairs = arithmetic.compare(example.answer, answer)
  if equal is not None:
    return _result(equal, answer)
  reason = next((r for _, part in pairs if (r := arithmetic.danger(part))), None)
  if reason:
    return _result(0.0, answer, reason)
  return Pending(pool.Call(slow.math_equal, (pairs,), ('math_verify',)), answer)


def judge_reasoning_gym(answer: str, example: Example) -> Pending:
  """reasoning-gym's own grader; args `dataset`, `entry`, `partial` (keep scores below 1)."""
  partial = bool(example.verifier_args.get('partial', False))
  args = (_arg(example, 'dataset'), _arg(example, 'entry'), answer, partial)
  return Pending(pool.Call(slow.reasoning_gym_score, args, ('reasoning_gym',)), answer)


VERIFIERS: dict[str, Verifier] = {
  'choice': Verifier(judge_choice),
  'countdown': Verifier(judge_countdown),
  'exact': Verifier(judge_exact),
  'exact_norm': Verifier(judge_exact_norm),
  'math': Verifier(judge_math),
  'mod_equal': Verifier(judge_mod_equal),
  'numeric_exact': Verifier(judge_numeric_exact),
  'reasoning_gym': Verifier(judge_reasoning_gym),
  'regex': Verifier(judge_regex),
  'set_equal': Verifier(judge_set_equal),
}


def get(name: str) -> Verifier:
  """The verifier of that name; RewardError lists them and the closest one otherwise."""
  if name in VERIFIERS:
    return VERIFIERS[name]
  close = difflib.get_close_matches(name, VERIFIERS, n=1)
  hint = f'did you mean {close[0]!r}? ' if close else ''
  raise RewardError(f'unknown verifier {name!r}: {hint}Known: {", ".join(VERIFIERS)}')
