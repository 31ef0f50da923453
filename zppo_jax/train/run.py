"""A run as a record, and its jitted programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from zppo_jax.core import types
from zppo_jax.core.errors import UserError
from zppo_jax.mesh import place
from zppo_jax.methods import api
from zppo_jax.train import checkpoint, evaluate, prepare, state, step
from zppo_jax.train.setup import Setup


@dataclasses.dataclass(frozen=True)
class LoopSettings:
  """How long, how stale, and what to write when; counts are rollout steps."""

  num_steps: int
  max_staleness: int = 0
  checkpoint_every: int = 10
  keep_checkpoints: int = 2
  eval_every: int = 0  # 0 = only before the first and after the last step
  log_every: int = 1
  dump_every: int = 10  # rollouts/step_N.jsonl for reading; 0 = never
  dump_rows: int = 16
  profile_start: int = -1  # first step of the profiler window, -1 = off
  profile_steps: int = 3
  tensorboard: bool = False
  phase_limit_s: float = 0.0  # longest phase of a step before the run is ended; 0 = any


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run, ready to go."""

  setup: Setup
  method: api.Method
  optimizer: Any
  learning_rate: Callable  # update number -> the policy's learning rate
  step_settings: step.StepSettings
  settings: LoopSettings
  stream: Any  # question ids, with get_state / set_state
  workdir: str
  eval_setup: Setup | None = None
  eval_settings: evaluate.EvalSettings | None = None
  reference: Any = None  # frozen policy for KL, where the method needs one
  warm_start: Any = None  # initial policy weights
  progress: bool = True


@dataclasses.dataclass(frozen=True)
class Sampled:
  """The sampled batch of one step, on its way to the update."""

  rollouts: tuple[types.Rollout, ...]
  group_sizes: tuple[int, ...]
  metrics: dict[str, float]
  dump: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Programs:
  """The jitted functions of a run."""

  prepare: Callable
  update: Callable
  absorb: Callable
  policy: Callable  # trained roles -> weights of the policy
  summary: Callable
  learning_rate: Callable
  roles: dict[str, Any]
  abstract: state.TrainState  # with shardings


def frozen_roles(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
  """({role: config}, {role: params}) of the frozen models that the jitted step or scorer reads."""
  configs, params = {}, {}
  if run.step_settings.adapters is not None:
    if run.warm_start is None:
      raise UserError('lora: adapters need the weights that they adapt: give init.checkpoint')
    configs['base'], params['base'] = run.setup.model, run.warm_start
  if run.method.needs & {'teacher_hidden', 'teacher_logp'}:
    if run.setup.teacher is None:
      raise UserError('teacher: the method scores with a teacher, but the run has none')
    if run.setup.teacher_questions is not None:
      raise UserError('teacher: the method compares token probabilities, but the teacher has '
                      'another tokenizer')
    configs['teacher'], params['teacher'] = run.setup.teacher
  if 'reference' in run.method.needs:
    if run.reference is None:
      raise UserError('reference: the method has a KL term, but the run has no reference policy')
    configs['reference'], params['reference'] = run.setup.model, run.reference
  elif run.reference is not None:
    raise UserError('reference: the run has a reference policy, but the method has no KL term '
                    '(kl_beta = 0) to read it')
  return configs, params


def compile_programs(run: Run) -> Programs:
  """Builds the jitted functions; the train state is donated and keeps its shardings."""
  config, method, mesh = run.setup.model, run.method, run.setup.mesh
  role_configs, roles = frozen_roles(run)
  in_step = {k: v for k, v in role_configs.items()
             if 'teacher_hidden' in method.needs or k == 'base'}
  adapters = run.step_settings.adapters
  init = lambda: state.create(config, method, run.optimizer, seed=run.setup.seed, adapters=adapters)
  shapes = jax.eval_shape(init)
  shardings = state.shardings(shapes, config, method, mesh, adapters)
  update = step.make_train_step(config, method, run.optimizer, run.step_settings, in_step)
  merged = lambda params, base: step.policy_of(config, run.step_settings, params, base)
  if adapters is not None:
    merged = jax.jit(merged)
  return Programs(
    prepare=jax.jit(prepare.make_prepare(config, method, run.step_settings, role_configs),
                    static_argnums=5),
    update=jax.jit(lambda s, parts, r: update(s, parts, {k: r[k] for k in in_step}),
                   donate_argnums=0, keep_unused=True,  # arrays that live on are in its memory
                   out_shardings=(shardings, place.replicated(mesh))),
    absorb=jax.jit(lambda s, parts: method.absorb(
      s, prepare.join(parts, max(p.tokens.shape[1] for p in parts)))),
    policy=lambda params: merged(params, roles.get('base')),
    summary=jax.jit(method.summary), learning_rate=jax.jit(run.learning_rate),
    roles=roles, abstract=checkpoint.abstract(shapes, shardings))


def initial_state(run: Run, programs: Programs) -> state.TrainState:
  shardings = jax.tree.map(lambda x: x.sharding, programs.abstract)
  make = jax.jit(lambda policy: state.create(run.setup.model, run.method, run.optimizer,
                                             seed=run.setup.seed, policy=policy,
                                             adapters=run.step_settings.adapters),
                 out_shardings=shardings)
  return make(run.warm_start)
