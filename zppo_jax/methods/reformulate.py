"""Texts of the second phase: candidates, wrong lists, hints, and the rewriting of traces.

Pure functions over strings; no array in sight. Source: arXiv:2606.18216 (the wording is our own).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from zppo_jax.rewards.answers import MAX_CHARS, extract
from zppo_jax.rewards.grade import normalise_distinct


@dataclasses.dataclass(frozen=True)
class Wording:
  """The sentences around the data; a small model that knows no English gets empty ones."""

  open_tag: str = '<candidate>'
  close_tag: str = '</candidate>'
  bcq: str = ('Two candidate responses follow in candidate tags. One of them is right and the '
              'other is wrong. Use them as references while you solve the problem yourself.')
  ncq: str = 'All of these answers are wrong: '
  traces: str = 'The wrong reasoning that led to them follows in candidate tags.'
  hint: str = 'A hint follows in hint tags.'
  hint_open: str = '<hint>'
  hint_close: str = '</hint>'
  compress: str = (
    'Rewrite the reasoning inside the source tags as a summary of at most five lines. Keep the '
    'essential steps and the final answer. Leave out exploration, self-correction, retries and '
    'filler. Do not work the problem out again and add nothing. Close with the final answer in a '
    'box, copied letter by letter. Put the summary in summary tags.')
  write_hint: str = (
    'Here is a problem with a right solution. Write one short hint that helps a student: a way to '
    'begin, or the key idea on the way. Do not give the final answer, do not box anything and do '
    'not copy the solution.')


FULL = Wording()
SHORT = Wording(open_tag='{', close_tag='}', bcq='', ncq='not ', traces='', hint='', hint_open='[',
                hint_close=']')
WORDINGS = {'full': FULL, 'short': SHORT}
_THINK = re.compile(r'</?think>')


def clean(text: str, wording: Wording) -> str:
  """Candidate text as data: its own think and candidate tags are removed, even re-forming ones."""
  tags = (wording.open_tag, wording.close_tag, wording.hint_open, wording.hint_close)
  while True:
    found = _THINK.sub('', text)
    for tag in tags:
      found = found.replace(tag, '')
    if found == text:
      return found.strip()
    text = found


def _block(text: str, wording: Wording) -> str:
  return f'{wording.open_tag}{clean(text, wording)}{wording.close_tag}'


def _join(parts: Sequence[str]) -> str:
  return '\n'.join(p for p in parts if p)


def build_bcq(question: str, right: str, wrong: str, rng: np.random.Generator,
              wording: Wording = FULL) -> str:
  """The question and two anonymous candidates in random order (a fair coin)."""
  pair = [right, wrong] if rng.random() < 0.5 else [wrong, right]
  return _join([question, wording.bcq, *(_block(t, wording) for t in pair)])


def short_answer(source: str) -> str | None:
  """The boxed answer of a trace, if it has one that no grader would refuse for its length."""
  answer = extract(source)
  return None if answer is None or len(answer) > MAX_CHARS else answer


def build_ncq(question: str, traces: Sequence[str], answers: Sequence[str | None],
              wording: Wording = FULL) -> str:
  """The question, the distinct wrong answers boxed, and every wrong trace.

  Answers that did not parse, or that no grader would read for their length, add a trace but no
  listed answer; with none left there is no list.
  """
  distinct = normalise_distinct([a for a in answers if a is None or len(a) <= MAX_CHARS])
  listed = ', '.join(f'\\boxed{{{clean(a, wording)}}}' for a in distinct)
  return _join([question, wording.ncq + listed if distinct else '', wording.traces,
                *(_block(t, wording) for t in traces)])


def build_hint(question: str, hint: str, wording: Wording = FULL) -> str:
  """The question and an answer-free hint."""
  return _join([question, wording.hint,
                f'{wording.hint_open}{clean(hint, wording)}{wording.hint_close}'])


def prompt_bound(prompt_tokens: int, group_size: int, compress_tokens: int, wording: str) -> int:
  """Tokens of a BCQ or NCQ prompt that the config check demands room for.

  Room for every candidate with its tags and a listed answer of some tokens; the longest sentences
  are the spec's 256 tokens, and none at all for the short wording. A prompt that needs more, for
  answers may be long, is dropped and counted (`second_phase.with_room`).
  """
  per_candidate, fixed = (16, 256) if wording == 'full' else (12, 8)
  return prompt_tokens + group_size * (compress_tokens + per_candidate) + fixed


def compress_prompt(trace: str, wording: Wording = FULL) -> str:
  """Instruction of the rewriter, the same for right and wrong traces."""
  body = trace.replace('<source>', '').replace('</source>', '')
  return _join([wording.compress, f'<source>{body}</source>'])


def hint_prompt(question: str, solution: str, wording: Wording = FULL) -> str:
  """Instruction of the hint writer."""
  return _join([wording.write_hint, f'<problem>{question}</problem>',
                f'<solution>{solution}</solution>'])


def read_summary(text: str) -> str:
  """Content of the summary tags; the whole text where they are missing."""
  inside = re.search(r'<summary>(.*?)(?:</summary>|$)', text, re.DOTALL)
  return (inside.group(1) if inside else text).strip()


def keeps_answer(source: str, summary: str) -> bool:
  """True when the summary claims no other answer than its source."""
  answer, new = extract(source), extract(summary)
  return new is None or answer == new


def restore_answer(source: str, summary: str) -> str:
  """Appends the source's boxed answer where the summary was cut off before it."""
  answer = short_answer(source)
  if answer is None or extract(summary) is not None:
    return summary
  return _join([summary, f'\\boxed{{{answer}}}'])


def leaks_answer(hint: str, solution: str) -> bool:
  """True for a hint with a box, the final answer as a word, or a copied line of the solution."""
  answer = extract(solution)
  lines = [x.strip() for x in solution.splitlines() if len(x.strip()) > 20]
  word = answer is not None and re.search(rf'(?<!\w){re.escape(answer)}(?!\w)', hint) is not None
  return '\\boxed' in hint or word or any(x in hint for x in lines)
