"""A run without models: scripted rewards, prompts and calls on record, as an `api.Context`."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from zppo_jax.core import rng, types
from zppo_jax.methods import api

TOKENS = 6  # columns of a row: two of prompt, three of response, one of padding


def make_rollout(groups, reward, *, capacity, group_size, first_id=0, role=types.POLICY):
  """Rows of the groups, then padding rows; token ids are the row numbers."""
  rows = capacity * group_size
  per_row = lambda values, blank: np.repeat(
    np.asarray([*values, *[blank] * (capacity - len(groups))], np.int32), group_size)
  valid = np.arange(rows) < len(groups) * group_size
  response = np.broadcast_to((np.arange(TOKENS) >= 2) & (np.arange(TOKENS) < 5), (rows, TOKENS))
  mask = response & valid[:, None]
  zeros = np.zeros((rows, TOKENS), np.int32)
  return jax.tree.map(jnp.asarray, types.Rollout(
    tokens=zeros + np.arange(rows, dtype=np.int32)[:, None],
    segment_ids=np.broadcast_to(np.arange(TOKENS) < 5, (rows, TOKENS)).astype(np.int32),
    positions=zeros + np.arange(TOKENS, dtype=np.int32), loss_mask=mask,
    behavior_logp=np.where(mask, -1.0, 0.0).astype(np.float32), version=zeros,
    turn_id=response.astype(np.int32),
    group_id=np.repeat(first_id + np.arange(capacity, dtype=np.int32), group_size),
    traj_id=first_id * group_size + np.arange(rows, dtype=np.int32),
    traj_tokens=mask.sum(1).astype(np.float32), role_id=np.full(rows, role, np.int32),
    kind=per_row([g.kind for g in groups], 0),
    question_id=per_row([g.question for g in groups], -1),
    reward=np.asarray(reward, np.float32), status=np.zeros(rows, np.int32), valid=valid))


def make_drawn(groups, rewards, *, capacity=None, first_id=0, role=types.POLICY, texts=None,
               answers=None) -> api.Drawn:
  """Drawn with rewards[slot][sample]; texts and answers default to names of the row."""
  group_size = len(rewards[0])
  capacity = len(groups) if capacity is None else capacity
  rows, used = capacity * group_size, len(groups) * group_size
  reward = np.zeros(rows, np.float32)
  reward[:used] = np.asarray(rewards[:len(groups)]).reshape(-1)
  blank = rows - used
  texts = texts or [f'trace {g.question}.{i}' for g in groups for i in range(group_size)]
  answers = answers or [f'{g.question}{i}' for g in groups for i in range(group_size)]
  rollout = make_rollout(groups, reward, capacity=capacity, group_size=group_size,
                         first_id=first_id, role=role)
  return api.Drawn(rollout, (*groups, *[None] * (capacity - len(groups))), group_size,
                   (*texts, *[''] * blank), (*answers, *[None] * blank), reward)


@dataclasses.dataclass
class FakeContext:
  """`teacher_right`: questions that the teacher answers right; `writer(prompt) -> text`."""

  teacher_right: frozenset[int] = frozenset()
  writer: object = None
  cut_questions: frozenset[int] = frozenset()  # whose teacher answers were cut by length
  too_long: frozenset[int] = frozenset()  # whose reformulated prompts have no room
  step: int = 0
  reward: object = None  # reward(group, sample) of second-phase rows; 0 by default
  fresh: int = 1000  # next id of the loader

  def __post_init__(self):
    self.draws = []  # (groups, keyword arguments)
    self.written = []  # (prompts, max_tokens, tag)
    self.counts = collections.defaultdict(lambda: [0.0, 0.0])

  def key(self, *names):
    return rng.fold(jax.random.key(0), self.step, *names)

  def rng(self, *names):
    return rng.host_rng(0, self.step, *names)

  def example(self, question):
    return types.Example(f'q{question}', (types.Message('user', f'question {question}'),),
                         str(question), solution=f'work {question}\n\\boxed{{{question}}}')

  def distractor(self, question):
    return str(question + 1)

  def others(self, question, count, rng):
    return [int(q) for q in rng.integers(100, 200, size=count)]

  def next_questions(self, count):
    self.fresh += count
    return np.arange(self.fresh - count, self.fresh, dtype=np.int32)

  def encode(self, text):
    return tuple(map(ord, text))

  def decode(self, ids):
    return ''.join(map(chr, ids))

  def fits(self, group, *, reformulated=False):
    return group.question not in self.too_long

  def count(self, name, numerator, denominator):
    self.counts[name][0] += numerator
    self.counts[name][1] += denominator

  def write(self, prompts, *, max_tokens, tag):
    self.written.append((list(prompts), max_tokens, tag))
    return [self.writer(p) for p in prompts]

  def draw(self, groups, *, capacity, first_id=0, group_size=None, role=types.POLICY,
           greedy=False, reformulated=False, forced_tokens=0):
    assert len(groups) <= capacity
    size = group_size or 8
    self.draws.append((list(groups), dict(
      capacity=capacity, first_id=first_id, group_size=size, role=role, greedy=greedy,
      reformulated=reformulated, forced_tokens=forced_tokens)))
    if role == types.TEACHER:
      rewards = [[float(g.question in self.teacher_right)] * size for g in groups]
      texts = [f'teacher {g.question}.{i} \\boxed{{{g.question}}}' for g in groups
               for i in range(size)]
    else:
      value = self.reward or (lambda group, sample: 0.0)
      rewards = [[value(g, i) for i in range(size)] for g in groups]
      texts = None
    if any(g.response is not None for g in groups):
      texts = [self.decode(g.response) for g in groups]
      rewards, role = [[1.0] for _ in groups], types.TEACHER
    found = make_drawn(groups, rewards or [[0.0] * size], capacity=capacity, first_id=first_id,
                       role=role, texts=texts)
    cut = np.isin(found.rollout.question_id, list(self.cut_questions))
    return dataclasses.replace(found, rollout=dataclasses.replace(
      found.rollout, status=jnp.asarray(cut, jnp.int32)))

  def asked(self, role=types.TEACHER):
    """Questions of all draws by a role, in order."""
    return [g.question for groups, kwargs in self.draws if kwargs['role'] == role for g in groups]
