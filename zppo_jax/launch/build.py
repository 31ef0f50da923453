"""From a config to a run: data, tokenizer, models, roles, method. No array exists before
`validate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from kernels import tls_attention as tls
from zppo_jax.core import types
from zppo_jax.core.errors import UserError
from zppo_jax.data import batches
from zppo_jax.data import tokenizer as tokenizer_lib
from zppo_jax.data.tasks import sources
from zppo_jax.launch import roles, turns
from zppo_jax.mesh import hosts, place
from zppo_jax.methods import api, table
from zppo_jax.models.config import Sparse
from zppo_jax.rewards.grade import Grader
from zppo_jax.sampling import decode
from zppo_jax.train import evaluate, run, state, step
from zppo_jax.train.setup import Questions, Setup

TOKENIZER_TEXTS = 2000  # examples whose characters a character tokenizer must know


def method_config(config: Any) -> Any:
  """The method's frozen config: its row's values, changed where the config is not None."""
  given = {k: v for k, v in config.method.items() if k != 'name' and v is not None}
  return table.configure(config.method.name, given)


def build_method(config: Any) -> api.Method:
  return table.METHODS[config.method.name].build(method_config(config))


def task_spec(config: Any, split: str) -> dict[str, Any]:
  """Dict of `sources.build_source` for 'train' or 'validation'."""
  data = config.data
  if data.path:
    return dict(path=data.path, schema=data.schema, split=split, on_bad_row=data.on_bad_row,
                heldout_percent=data.heldout_percent)
  size = data.size if split == 'train' else data.eval_size
  parts, weights = [], []
  for spec in data.tasks.to_dict().values():
    weights.append(spec.pop('weight', 1.0))
    parts.append(spec | dict(seed=config.seed, split=split, size=size))
  return dict(mix=parts, weights=weights, size=size)


def build_source(config: Any, split: str):
  """Task source of a split. Raises UserError with the data layer's own message."""
  if config.agent.env:
    return turns.env_source(config, split)
  try:
    return sources.build_source(task_spec(config, split))
  except ValueError as error:
    raise UserError(f'data: {error}') from error


def texts_of(source, limit: int = TOKENIZER_TEXTS):
  """Everything that a tokenizer must be able to write, of the first examples."""
  for i in range(min(limit, len(source))):
    example = source[i]
    yield from (m.content for m in example.messages)
    yield example.answer
    yield example.solution or ''


def build_tokenizer(config: Any, source):
  """Tokenizer of a config; a character tokenizer knows every character of the data."""
  spec = {k: v for k, v in config.tokenizer.items() if v}
  if spec['kind'] == 'auto':
    own = roles.own_tokenizer(config.init.checkpoint)
    spec |= dict(kind='hf', path=spec.get('path', own)) if own else dict(kind='char')
  if spec['kind'] != 'char':
    spec.pop('pieces', None)
  limit = len(source) if config.data.path else TOKENIZER_TEXTS
  return tokenizer_lib.build_tokenizer(spec, texts_of(source, limit))


def build_template(config: Any):
  """Template of a config; 'auto' is that of the published checkpoint, or plain text."""
  if config.data.template != 'auto':
    return config.data.template
  return roles.own_template(config.init.checkpoint) or 'plain'


def sampling_settings(config: Any, stop_id: int) -> decode.Settings:
  r = config.rollout
  return decode.Settings(max_new_tokens=r.max_new_tokens, eos_ids=(stop_id,),
                         temperature=r.temperature)


def loop_settings(config: Any) -> run.LoopSettings:
  log = config.log
  return run.LoopSettings(
    num_steps=config.num_steps, max_staleness=config.max_staleness,
    checkpoint_every=config.ckpt.every_steps, keep_checkpoints=config.ckpt.keep,
    eval_every=config.eval.every_steps, log_every=log.every_steps,
    dump_every=log.dump_every_steps, dump_rows=log.dump_rows, profile_start=log.profile_start,
    profile_steps=log.profile_steps, tensorboard=log.tensorboard,
    phase_limit_s=log.phase_limit_s)


def step_settings(config: Any) -> step.StepSettings:
  return step.StepSettings(window=config.rollout.max_new_tokens,
                           temperature=config.rollout.temperature,
                           micro_batches=config.train.micro_batches, chunk=config.train.chunk,
                           share_prompts=config.train.share_prompts,
                           adapters=roles.adapters(config))


def longest(questions: Questions, limit: int = TOKENIZER_TEXTS) -> tuple[int, int, int, int]:
  """(tokens, row) of the longest plain prompt and of the longest worked solution, stop included.

  Looks at the first `limit` rows of a procedural source, and at every row of a file.
  """
  source = questions.source
  rows = len(source) if hasattr(source, 'examples') else min(limit, len(source))
  prompt = max((len(questions.plain_ids(i)), i) for i in range(rows))
  response = max((len(_given(questions, questions.example(i))) + 1, i) for i in range(rows))
  return *prompt, *response


def _given(questions: Questions, example: types.Example) -> Sequence[int]:
  if example.dialogue:
    return questions.worked(example)[0]
  return questions.tokenizer.encode(example.solution or '')


def check_lengths(questions: Questions, *, prompt_tokens: int, response_tokens: int | None) -> None:
  """Raises UserError naming the longest question that does not fit its bucket, before any work.

  `response_tokens` None: the solutions are not trained on and may have any length.
  """
  prompt, row, response, response_row = longest(questions)
  if prompt > prompt_tokens:
    raise UserError(
      f'rollout.prompt_tokens: question {questions.example(row).uid} (row {row}) has {prompt} '
      f'tokens, the largest bucket holds {prompt_tokens}')
  if response_tokens is not None and response > response_tokens:
    raise UserError(
      f'rollout.max_new_tokens: the solution of {questions.example(response_row).uid} (row '
      f'{response_row}) has {response} tokens, the largest bucket holds {response_tokens}')


def sparse_settings(rollout: Any) -> Sparse | None:
  """How many keys tokens are drawn by, of the section `rollout`; None = all."""
  s = rollout.sparse
  if not s.top_tokens:
    return None
  return Sparse(tls.Config(block=s.block, top_blocks=s.top_blocks, top_tokens=s.top_tokens,
                           sink_blocks=s.sink_blocks, stale=s.stale), labels=s.labels,
                pool=s.pool, misses=s.misses)


def build(config: Any, workdir: str, *, grader: Grader) -> run.Run:
  """A run ready for `loop.train`. The config must have passed `validate`."""
  if config.launch.compilation_cache:
    jax.config.update('jax_compilation_cache_dir', config.launch.compilation_cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  method = build_method(config)
  mesh = place.make_mesh(config.mesh)
  train_source, eval_source = build_source(config, 'train'), build_source(config, 'validation')
  tokenizer = build_tokenizer(config, train_source)
  model = roles.architecture(config.model, config.init.checkpoint, tokenizer.vocab_size)
  if hosts.is_first():
    roles.write_facts(workdir, model, tokenizer, roles.adapters(config), config.init.checkpoint)
  questions = Questions(train_source, tokenizer, build_template(config), config.data.instruction,
                        turns.system_text(config), config.agent.parser)
  held_out = dataclasses.replace(questions, source=eval_source)
  given = config.rollout.max_new_tokens if 'solutions' in method.needs else None
  check_lengths(questions, prompt_tokens=config.rollout.prompt_tokens, response_tokens=given)
  check_lengths(held_out, prompt_tokens=config.rollout.prompt_tokens, response_tokens=None)
  sampling = sampling_settings(config, questions.stop_id)
  teacher = teacher_questions = warm = None
  if config.teacher.checkpoint:
    teacher, teacher_questions = roles.load_teacher(
      config.teacher.model, config.teacher.checkpoint, questions, mesh)
  if config.init.checkpoint:
    warm = roles.load_init(config.init.checkpoint, model, tokenizer, mesh)
  r, e = config.rollout, config.eval
  setup = Setup(
    model=model, questions=questions, grader=grader, sampling=sampling,
    group_size=method.group_size, prompt_tokens=r.prompt_tokens,
    reformulated_tokens=r.reformulated_tokens, seed=config.seed, teacher=teacher,
    teacher_questions=teacher_questions, write_prompt_tokens=r.write_prompt_tokens,
    write_chunk=r.write_chunk, chunk_groups=r.chunk_groups, slots=r.slots,
    allow_fractional=config.data.allow_fractional, mesh=mesh, episodes=turns.build_episodes(config),
    sparse=sparse_settings(r))
  eval_sampling = dataclasses.replace(sampling, temperature=e.temperature, top_k=e.top_k,
                                      top_p=e.top_p, min_p=e.min_p)
  optim = state.Optim(**config.optim)
  return run.Run(
    setup=setup, method=method, optimizer=state.make_optimizer(optim),
    learning_rate=state.schedule(optim.learning_rate, optim),
    step_settings=step_settings(config), settings=loop_settings(config),
    stream=batches.prompt_stream(train_source, batch_size=method_config(config).num_new,
                                 seed=config.seed),
    workdir=workdir,
    eval_setup=dataclasses.replace(setup, questions=held_out),
    eval_settings=evaluate.EvalSettings(e.num_questions, e.chunk, e.samples, eval_sampling),
    reference=warm if 'reference' in method.needs else None, warm_start=warm,
    progress=config.log.progress)
