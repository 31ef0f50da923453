"""A run small enough for every property: two layers, one-digit sums, a grader that tosses coins.

Everything is the library's own (sources, tokenizer, sampler, scorer, step) but the verdicts: a
random model is never right, so `CoinGrader` draws them from a hash of the answer.
"""

import dataclasses
import functools
import zlib

import jax
import numpy as np

from zppo_jax.core import rng, trees
from zppo_jax.data import batches
from zppo_jax.data import tokenizer as tokenizer_lib
from zppo_jax.data.tasks import sources
from zppo_jax.mesh import place
from zppo_jax.methods import table
from zppo_jax.models import params as params_lib
from zppo_jax.models.config import ModelConfig
from zppo_jax.rewards.verifiers import VerifyResult
from zppo_jax.sampling import decode
from zppo_jax.train import context, loop, state, step
from zppo_jax.train import run as run_lib
from zppo_jax.train import setup as setup_lib

PROMPT, REFORMULATED, RESPONSE, INSTRUCTION = 8, 112, 16, 640  # token buckets
SETTINGS = step.StepSettings(window=RESPONSE, chunk=8)
OPTIM = state.Optim(learning_rate=1e-2, critic_learning_rate=1e-2, eps=1e-2, weight_decay=0.1)
SLOTS = 5  # groups of a first phase, replays included: all rows share the shapes of a sampler call
# Values of a field that every row shares, where the row has the field at all.
SIZES = dict(group_size=4, teacher_group_size=2, teacher_chunk=4, buffer_capacity=8,
             rho_aug=0.5, rho_replay=0.25, compress_tokens=8, wording='short', prefix_tokens=6,
             chunk=8, bcq_fraction=0.5, ncq_fraction=0.5, label_noise=0.5, max_wrong=3)


class CoinGrader:
  """Right or wrong by a hash of question and answer; every third answer does not parse."""

  def __init__(self, share: float = 0.38):
    self.share = share

  def grade(self, texts, examples):
    results = []
    for text, example in zip(texts, examples, strict=True):
      coin = zlib.crc32(f'{example.uid}/{text}'.encode())
      parsed = str(coin // 1000 % 7) if coin % 3 else None
      results.append(VerifyResult(float(coin % 1000 < 1000 * self.share), parsed, ''))
    return np.asarray([r.score for r in results], np.float32), results


class FixedGrader:
  """Every answer of a call is worth the same: the next value, at the end the last one for good."""

  def __init__(self, *values: float):
    self.values = list(values)

  def grade(self, texts, examples):
    value = self.values.pop(0) if len(self.values) > 1 else self.values[0]
    return np.full(len(texts), value, np.float32), CoinGrader().grade(texts, examples)[1]


@functools.cache
def source():
  return sources.build_source(dict(name='arithmetic', digits=1, terms=2, size=64))


@functools.cache
def tokenizer():
  return tokenizer_lib.build_tokenizer(dict(kind='char', pieces=('\\boxed{',)))


@functools.cache
def questions():
  return setup_lib.Questions(source(), tokenizer(), 'plain')


def model(**changes) -> ModelConfig:
  size = tokenizer().vocab_size
  fields = dict(vocab=-(-size // 8) * 8, num_valid=size, hidden=32, layers=2, heads=2, kv_heads=2,
                head_dim=16, inter=32, rope_theta=1e4, context=1024)
  return ModelConfig(**fields | changes)


@functools.cache
def _draw_weights():
  return jax.jit(lambda key: params_lib.init(model(), key))


@functools.cache
def weights(seed: int):
  """Random parameters of the usual size: larger ones amplify rounding beyond the tolerances."""
  return _draw_weights()(jax.random.key(seed))


def mesh(shape=None):
  """One device, or as many as the shape wants."""
  count = int(np.prod(list(shape.values()))) if shape else 1
  return place.make_mesh(shape or {}, jax.devices()[:count])


def overrides(name: str, **changes) -> dict:
  """Tiny sizes for the fields that the row has; published switches stay."""
  defaults = table.METHODS[name].defaults
  own = vars(defaults)
  found = {k: v for k, v in SIZES.items() if k in own} | dict(num_new=SLOTS)
  if own.get('use_buffer'):
    found['num_new'] = SLOTS - 1  # and one replay
  if own.get('iterations', 1) > 1:
    found['iterations'] = 2
  if own.get('max_tokens'):
    found['max_tokens'] = RESPONSE
  if own.get('overlong_buffer'):
    found['overlong_buffer'] = 4
  return found | changes


def setup(method, on, *, grader=None, seed=0, **changes) -> setup_lib.Setup:
  specials = tuple(sorted(tokenizer().special.values()))  # a random model should stop now and then
  return setup_lib.Setup(
    model=model(), questions=questions(), grader=grader or CoinGrader(),
    sampling=decode.Settings(max_new_tokens=RESPONSE, eos_ids=specials),
    group_size=method.group_size, prompt_tokens=PROMPT, reformulated_tokens=REFORMULATED,
    seed=seed, teacher=(model(), weights(7)), write_prompt_tokens=INSTRUCTION, write_chunk=4,
    mesh=on, **changes)


def make_run(name: str, *, shape=None, grader=None, optim=OPTIM, settings=SETTINGS, method=None,
             **changes) -> run_lib.Run:
  """The run of a row at tiny size; `changes` are method fields."""
  fields = overrides(name, **changes)
  method = method or table.build(name, fields)
  return run_lib.Run(
    setup=setup(method, mesh(shape), grader=grader), method=method,
    optimizer=state.make_optimizer(optim), learning_rate=state.schedule(optim.learning_rate, optim),
    step_settings=settings,
    settings=run_lib.LoopSettings(num_steps=3, dump_every=0),
    stream=batches.prompt_stream(source(), batch_size=fields['num_new'], seed=0), workdir='',
    reference=weights(5) if 'reference' in method.needs else None, warm_start=weights(1),
    progress=False)


def copy(tree):
  """A tree that survives the donation of the original."""
  return jax.tree.map(np.array, jax.device_get(tree))


@dataclasses.dataclass(frozen=True)
class Step:
  """One real step and everything it made, on the host."""

  at: int
  before: state.TrainState  # as the update found it
  item: loop.Sampled
  parts: tuple[step.Part, ...]
  after: state.TrainState
  metrics: dict


def minibatch_key(run: run_lib.Run, at: int):
  return rng.fold(jax.random.key(run.setup.seed), at, 'minibatches')


def take_step(run: run_lib.Run, programs: run_lib.Programs, train_state, at: int) -> Step:
  """Plan, draw, explore, score, credit, update, absorb: as `loop.train` does it."""
  method_state, item = loop.sample(run, programs.policy(train_state.params), train_state.method,
                                   at, train_state.version, context.no_timer)
  method_state, parts = programs.prepare(train_state.params, method_state, item.rollouts,
                                         minibatch_key(run, at), programs.roles, item.group_sizes)
  before = copy(dataclasses.replace(train_state, method=method_state))
  after, metrics = programs.update(dataclasses.replace(train_state, method=method_state), parts,
                                   programs.roles)
  after = dataclasses.replace(after, method=programs.absorb(after.method, item.rollouts))
  metrics = metrics | programs.summary(after.method)
  return Step(at, before, item, copy(parts), after, copy(metrics))


def gradients(train_state: state.TrainState) -> dict[str, np.ndarray]:
  """First moments of every parameter: gradients, where parameters would hide them in rounding."""
  leaves = trees.named_leaves(train_state.opt_state)
  return {k: v for k, v in leaves.items() if '.mu.' in k}


def assert_close(found, wanted, tolerance: float):
  """Moments within tolerance of the norm of all of them, metrics within tolerance."""
  size = sum((x**2).sum() for x in wanted[0].values()) ** 0.5
  assert size > 0 and found[0].keys() == wanted[0].keys()
  for key, value in wanted[0].items():
    np.testing.assert_allclose(found[0][key], value, rtol=0, atol=tolerance * size, err_msg=key)
  assert found[1].keys() == wanted[1].keys()
  for key, value in wanted[1].items():
    np.testing.assert_allclose(found[1][key], value, rtol=tolerance, atol=tolerance, err_msg=key)
