"""The host side of a step: rendering questions, drawing groups, decoding and grading them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zppo_jax.agents import traces
from zppo_jax.core import rng, trees, types
from zppo_jax.core.errors import UserError
from zppo_jax.envs import api as envs_api
from zppo_jax.mesh import hosts, place
from zppo_jax.methods import api
from zppo_jax.rewards import grade as grade_lib
from zppo_jax.sampling import decode, engine
from zppo_jax.train import episodes
from zppo_jax.train.setup import Questions, Setup

Timer = Any  # timer(phase) is a context manager that adds up seconds


def no_timer(phase: str):
  del phase
  return contextlib.nullcontext()


def pad_ids(rows: Sequence[Sequence[int]], size: int) -> tuple[np.ndarray, np.ndarray]:
  """Right-padded i32[n, size] and lengths i32[n]."""
  out = np.zeros((len(rows), size), np.int32)
  for i, row in enumerate(rows):
    out[i, :len(row)] = row
  return out, np.asarray([len(r) for r in rows], np.int32)


def group_names(groups: Sequence[api.Group]) -> list[str]:
  """A name per group, for its noise: whatever else is drawn, it stays."""
  seen: dict[tuple, int] = collections.defaultdict(int)
  names = []
  for group in groups:
    twin = group.question, group.kind
    names.append(f'{group.question}/{group.kind}/{seen[twin]}')
    seen[twin] += 1
  return names


class StepContext:
  """One step's `methods.api.Context`; the policy's weights are those given at construction."""

  def __init__(self, setup: Setup, params, *, step: int, version: int, stream=None,
               timer: Timer = no_timer):
    self.step = step
    self._setup, self._params, self._version = setup, params, version
    self._stream, self._timer = stream, timer
    self._counts: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])

  def key(self, *names):
    return rng.fold(jax.random.key(self._setup.seed), self.step, *names)

  def rng(self, *names) -> np.random.Generator:
    return rng.host_rng(self._setup.seed, self.step, *names)

  def example(self, question: int) -> types.Example:
    return self._setup.questions.example(question)

  def distractor(self, question: int) -> str:
    source = self._setup.questions.source
    if hasattr(source, 'distractor'):
      return source.distractor(question)
    gold = self.example(question).answer  # the user's own data: another question's answer
    for other in self.others(question, 20, self.rng('distractor', question)):
      if self.example(other).answer != gold:
        return self.example(other).answer
    return gold + '0'

  def others(self, question: int, count: int, rng: np.random.Generator) -> list[int]:
    rows = rng.integers(len(self._setup.questions.source), size=count)
    return [int(r) for r in rows if r != question]

  def next_questions(self, count: int) -> np.ndarray:
    found = []
    while sum(map(len, found)) < count:
      found.append(next(self._stream))
    return np.concatenate(found)[:count]

  def encode(self, text: str) -> tuple[int, ...]:
    return tuple(self._setup.questions.tokenizer.encode(text))

  def decode(self, ids: Sequence[int]) -> str:
    return self._setup.questions.tokenizer.decode(ids)

  def worked(self, question: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    return self._setup.questions.worked(self.example(question))

  def count(self, name: str, numerator: float, denominator: float) -> None:
    self._counts[name][0] += numerator
    self._counts[name][1] += denominator

  def metrics(self) -> dict[str, float]:
    """Ratios counted so far."""
    return {k: n / d if d else 0.0 for k, (n, d) in self._counts.items()}

  def _questions(self, role: int) -> Questions:
    """Who renders and reads for a role: teachers may have a tokenizer of their own."""
    own = self._setup.teacher_questions if role == types.TEACHER else None
    return own or self._setup.questions

  def _prompt_ids(self, group: api.Group, role: int = types.POLICY) -> tuple[int, ...]:
    questions = self._questions(role)
    if group.messages is None:
      return questions.plain_ids(group.question)
    return questions.render(group.messages)

  def _check_fits(self, group: api.Group, ids: Sequence[int], bucket: int, what: str) -> None:
    if len(ids) > bucket:
      uid = self.example(group.question).uid if group.question >= 0 else 'instruction'
      raise UserError(f'{what}: question {uid} (row {group.question}, kind {group.kind}) has '
                      f'{len(ids)} tokens, the largest bucket holds {bucket}')

  def _bucket(self, reformulated: bool) -> int:
    return self._setup.reformulated_tokens if reformulated else self._setup.prompt_tokens

  def fits(self, group: api.Group, *, reformulated: bool = False) -> bool:
    return len(self._prompt_ids(group)) <= self._bucket(reformulated)

  def _prompts(self, groups, *, capacity: int, first_id: int, bucket: int,
               forced_tokens: int, role: int) -> decode.Prompts:
    rows = [self._prompt_ids(g, role) for g in groups]
    for group, ids in zip(groups, rows):
      self._check_fits(group, ids, bucket, 'prompt')
      self._check_fits(group, group.forced, forced_tokens, 'forced prefix')
    blank = [(0,)] * (capacity - len(groups))
    tokens, length = pad_ids([*rows, *blank], bucket)
    forced, forced_length = pad_ids([g.forced for g in groups] + [()] * len(blank), forced_tokens)
    request = np.zeros(capacity, np.uint32)
    request[:len(groups)] = [rng.name_hash(name) for name in group_names(groups)]

    def column(values, blank_value):
      return np.asarray([*values, *[blank_value] * len(blank)], np.int32)

    return decode.Prompts(
      tokens=tokens, length=length, forced=forced, forced_length=forced_length, request=request,
      group_id=first_id + np.arange(capacity, dtype=np.int32),
      kind=column([g.kind for g in groups], 0),
      question_id=column([g.question for g in groups], -1),
      valid=np.arange(capacity) < len(groups))

  def draw(self, groups: Sequence[api.Group], *, capacity: int, first_id: int = 0,
           group_size: int | None = None, role: int = types.POLICY, greedy: bool = False,
           reformulated: bool = False, forced_tokens: int = 0) -> api.Drawn:
    setup = self._setup
    size = setup.group_size if group_size is None else group_size
    if len(groups) > capacity:
      raise ValueError(f'groups: {len(groups)} do not fit into capacity = {capacity}')
    bucket = self._bucket(reformulated)
    if any(g.response is not None for g in groups):
      rollout = self._given(groups, capacity=capacity, first_id=first_id, bucket=bucket)
      return self._finish(rollout, groups, 1, capacity, graded=False, role=types.POLICY)
    settings = dataclasses.replace(setup.sampling, group_size=size)
    if greedy:
      settings = dataclasses.replace(settings, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    if setup.episodes is not None and role == types.POLICY:
      return self._episodes(groups, settings, capacity=capacity, first_id=first_id, bucket=bucket)
    prompts = self._prompts(groups, capacity=capacity, first_id=first_id, bucket=bucket,
                            forced_tokens=forced_tokens, role=role)
    rollout = self._generate(prompts, settings, role)
    return self._finish(rollout, groups, size, capacity, graded=True, role=role)

  def _generate(self, prompts: decode.Prompts, settings: decode.Settings, role: int):
    setup = self._setup
    if role == types.TEACHER and setup.teacher is None:
      raise UserError('teacher: the method samples a teacher, but the run has none')
    config, params = setup.teacher if role == types.TEACHER else (setup.sampler, self._params)
    name = 'teacher' if role == types.TEACHER else 'policy'
    if self._questions(role) is not setup.questions:
      settings = dataclasses.replace(settings, eos_ids=(self._questions(role).stop_id,))
    with self._timer(f'rollout_{name}'):
      sample = self._by_slots if setup.slots else self._by_batches
      rollout = sample(config, params, prompts, self.key('rollout', name), settings)
      return jax.block_until_ready(dataclasses.replace(
        rollout, role_id=jnp.full_like(rollout.role_id, role)))

  def _episodes(self, groups, settings, *, capacity: int, first_id: int, bucket: int) -> api.Drawn:
    """Groups of episodes; the last answer is graded, unless an environment did."""
    setup, size = self._setup, settings.group_size
    if any(g.forced for g in groups):
      raise UserError('agent: episodes of several turns take no forced prefixes')
    tasks = []
    for name, group in zip(group_names(groups), groups):
      example = self.example(group.question)
      messages = setup.questions.instruct(group.messages or example.messages)
      tasks.append(envs_api.Task(name, example.meta | dict(messages=messages)))
    with self._timer('rollout_policy'):
      found = episodes.run(
        setup.episodes, tasks, config=setup.sampler, params=self._params, settings=settings,
        tokenizer=setup.questions.tokenizer, template=setup.questions.template, slots=setup.slots,
        prompt_tokens=bucket, key=self.key('rollout', 'policy'), version=self._version)
    for name, ratio in episodes.metrics(found).items():
      self.count(name, *ratio)
    blank = capacity - len(groups)
    rollout = jax.tree.map(jnp.asarray, episodes.pack(
      found, size=bucket + settings.max_new_tokens, group_size=size, first_id=first_id,
      kind=[g.kind for g in groups] + [0] * blank,
      question_id=[g.question for g in groups] + [-1] * blank))
    return self._finish(rollout, groups, size, capacity, graded=setup.episodes.env is None,
                        role=types.POLICY, texts=[e.text for e in found])

  def _by_slots(self, config, params, prompts: decode.Prompts, key, settings) -> types.Rollout:
    rollout, stats = engine.run(config, params, prompts, key=key, settings=settings,
                                version=self._version, engine=engine.Engine(self._setup.slots))
    self.count('rollout/occupancy', stats.occupancy, 1)
    return rollout

  def _by_batches(self, config, params, prompts: decode.Prompts, key, settings) -> types.Rollout:
    setup = self._setup
    if setup.mesh is not None:
      prompts = jax.device_put(prompts, place.replicated(setup.mesh))
    slots = prompts.valid.shape[0]
    chunk = decode.call_slots(slots, setup.chunk_groups)
    pieces = [jax.tree.map(lambda x, i=i: x[i:i + chunk], prompts) for i in range(0, slots, chunk)]
    parts = [decode.generate(config, params, p, key=key, settings=settings, version=self._version)
             for p in pieces]
    return parts[0] if len(parts) == 1 else trees.concat(parts)

  def _given(self, groups, *, capacity: int, first_id: int, bucket: int) -> types.Rollout:
    """Rows of given responses, closed by the stop token; nothing is sampled."""
    width = self._setup.sampling.max_new_tokens
    parts = [[]] * capacity
    for i, group in enumerate(groups):
      prompt = self._prompt_ids(group)
      response = (*group.response, self._setup.questions.stop_id)
      self._check_fits(group, prompt, bucket, 'prompt')
      self._check_fits(group, response, width, 'response')
      others = pad_ids([(True,) * len(prompt) + group.others_said], len(prompt) + len(response))[0]
      tokens, mask = np.asarray((*prompt, *response)), others[0] == 0
      parts[i] = [traces.Row(tokens, mask, 0 * mask, 0 * mask, mask, len(prompt))]
    blank = capacity - len(groups)
    rollout = traces.pack(
      parts, size=bucket + width, count=capacity, first_traj=first_id,
      status=[types.FINISHED] * capacity, reward=[1.0] * len(groups) + [0.0] * blank,
      group_id=first_id + np.arange(capacity), kind=[g.kind for g in groups] + [0] * blank,
      question_id=[g.question for g in groups] + [-1] * blank)
    return jax.tree.map(jnp.asarray, dataclasses.replace(
      rollout, role_id=np.full(capacity, types.TEACHER, np.int32)))

  def _count_faults(self, rollout: types.Rollout, rows: int) -> None:
    """Raises UserError where no row has finite logits: the weights are broken."""
    bad = int((hosts.fetch(rollout.status)[:rows] == types.NONFINITE).sum())
    self.count('rollout/nonfinite_frac', bad, rows)
    if rows and bad == rows:
      raise UserError(f'rollout: the logits of all {rows} rows are not finite')

  def _finish(self, rollout: types.Rollout, groups, size: int, capacity: int, *,
              graded: bool, role: int, texts: list[str] | None = None) -> api.Drawn:
    """Decodes and grades the rows, and puts the rewards into the rollout. A row whose reward is NaN
    keeps it."""
    slots = (*groups, *[None] * (capacity - len(groups)))
    with self._timer('reward'):
      texts = self._texts(rollout, len(groups) * size, role) if texts is None else texts
      reward, answers = hosts.fetch(rollout.reward), [None] * len(texts)
      self._count_faults(rollout, len(texts))
      if graded and groups:
        examples = [self.example(g.question) for g in groups for _ in range(size)]
        scores, answers = self._grade(texts, examples)
        scores = np.pad(scores, (0, capacity * size - len(texts)))
        reward = np.where(np.isnan(reward), reward, scores).astype(np.float32)
        rollout = dataclasses.replace(rollout, reward=jnp.asarray(reward))
    blank = capacity * size - len(texts)
    return api.Drawn(rollout, slots, size, (*texts, *[''] * blank), (*answers, *[None] * blank),
                     reward.astype(np.float32))

  def _grade(self, texts: Sequence[str], examples: Sequence[types.Example]):
    """(scores f32[n], answers as read); every process grades its share. What no judge could say
    scores 0 and is counted."""
    def grade(rows):
      scores, results = self._setup.grader.grade([texts[i] for i in rows],
                                                 [examples[i] for i in rows])
      return [(float(s), r.parsed, r.unjudged) for s, r in zip(scores, results)]

    scores, answers, unjudged = zip(*hosts.share(grade, len(texts)))
    self.count('reward/unjudged_frac', sum(unjudged), len(texts))
    return grade_lib.check_rewards(
      scores, len(texts), allow_fractional=self._setup.allow_fractional), list(answers)

  def _texts(self, rollout: types.Rollout, rows: int, role: int) -> list[str]:
    tokens, turns = hosts.fetch((rollout.tokens, rollout.turn_id))
    decode_ids = self._questions(role).tokenizer.decode
    return [decode_ids(tokens[i][turns[i] > 0].tolist()) for i in range(rows)]

  def write(self, prompts: Sequence[str], *, max_tokens: int, tag: str) -> list[str]:
    setup = self._setup
    settings = dataclasses.replace(setup.sampling, group_size=1, temperature=0.0, top_k=0,
                                   top_p=1.0, min_p=0.0, max_new_tokens=max_tokens)
    found = []
    for begin in range(0, len(prompts), setup.write_chunk):
      part = prompts[begin:begin + setup.write_chunk]
      groups = [api.Group(-1, messages=(types.Message('user', p),)) for p in part]
      packed = self._prompts(groups, capacity=setup.write_chunk, first_id=0,
                             bucket=setup.write_prompt_tokens, forced_tokens=0,
                             role=types.TEACHER)
      found += self._texts(self._generate(packed, settings, types.TEACHER), len(part),
                           types.TEACHER)
    self.count(f'write/{tag}', len(prompts), 1)
    return found
