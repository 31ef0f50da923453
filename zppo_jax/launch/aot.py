"""Ahead-of-time compilation of a config for a TPU topology, on any host: does it fit, what does it
cost.

Needs the `libtpu` wheel (extra `aot`); no TPU. Nothing is allocated.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zppo_jax.core.errors import UserError
from zppo_jax.mesh import axes, place
from zppo_jax.methods import api
from zppo_jax.models import cache as cache_lib
from zppo_jax.models import flops
from zppo_jax.models import params as params_lib
from zppo_jax.models.config import ModelConfig
from zppo_jax.sampling import decode
from zppo_jax.train import checkpoint, memory, prepare, state, step


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a chip has, by its data sheet."""

  hbm_bytes: int
  flops: float  # per second, bfloat16
  bandwidth: float  # bytes per second


CHIPS = {'v5e': Chip(16 << 30, 197e12, 819e9), 'v5p': Chip(95 << 30, 459e12, 2765e9),
         'v6e': Chip(32 << 30, 918e12, 1640e9)}


@dataclasses.dataclass(frozen=True)
class Report:
  """What the compiler says of one program, per chip."""

  name: str
  memory: memory.Memory
  compile_seconds: float
  flops: float  # of the model, by formula, over all chips
  executed: float  # with what is computed again in the backward pass
  moved: float  # bytes that one chip must read at least
  chips: int
  chip: Chip

  @property
  def fits(self) -> bool:
    return self.memory.total <= self.chip.hbm_bytes

  @property
  def seconds(self) -> float:
    """Lower bound of the time: what the chips can compute, or read."""
    return max(self.executed / (self.chips * self.chip.flops), self.moved / self.chip.bandwidth)

  @property
  def mfu(self) -> float:
    """Share of the peak that the model's own operations reach in that time: an upper bound."""
    return self.flops / (self.chips * self.chip.flops * self.seconds)

  def line(self) -> str:
    return (f'{self.name:10s} {self.memory.line(self.chip.hbm_bytes)}; {self.flops:.3g} flops, at '
            f'least {self.seconds:.3g} s (MFU at most {self.mfu:.0%}); compiled in '
            f'{self.compile_seconds:.0f} s')


def topology_devices(name: str) -> tuple[Sequence[Any], Chip]:
  """(devices, chip) of 'v5p:4x4x4'. Raises UserError on a malformed or unknown
  name."""
  generation, _, shape = name.partition(':')
  if generation not in CHIPS or not all(x.isdigit() for x in shape.split('x')):
    raise UserError(f'topology: {name!r} is not GENERATION:AxB or :AxBxC with GENERATION in '
                    f'{sorted(CHIPS)}')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  from jax.experimental import topologies

  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=name).devices, \
      CHIPS[generation]
  except Exception as error:  # libtpu raises its own kinds
    raise UserError(f'topology: {name!r}: {error}') from error


def _whole(mesh, tree):
  """Abstract tree that every chip holds whole."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=NamedSharding(mesh, P())), tree)


def _rows(mesh, tree):
  """Abstract tree whose leading axis is cut over the data axes."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(
    mesh, axes.fit(('batch',) + (None,) * (len(x.shape) - 1), x.shape, mesh))), tree)


def _params(config: ModelConfig, mesh):
  specs = params_lib.abstract(config)
  return checkpoint.abstract(params_lib.shapes(specs), params_lib.shardings(specs, mesh))


def _prompts(slots: int, bucket: int) -> decode.Prompts:
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  return decode.Prompts(
    tokens=ints(slots, bucket), length=ints(slots), forced=ints(slots, 0),
    forced_length=ints(slots), request=jax.ShapeDtypeStruct((slots,), jnp.uint32),
    group_id=ints(slots), kind=ints(slots), question_id=ints(slots),
    valid=jax.ShapeDtypeStruct((slots,), jnp.bool_))


def _report(name: str, lowered, mesh, chip: Chip, *, parts: dict[str, Any], flops: float,
            executed: float, moved: float) -> Report:
  """Compiles; the compiler knows nothing of the operations inside kernels, hence the formulas."""
  begin = time.perf_counter()
  compiled = lowered.compile()
  return Report(name, memory.memory_report(compiled, parts), time.perf_counter() - begin, flops,
                executed, moved, mesh.size, chip)


@dataclasses.dataclass(frozen=True)
class Pod:
  """A run's shapes on a topology."""

  model: ModelConfig
  method: api.Method
  optimizer: Any
  step_settings: step.StepSettings
  sampling: decode.Settings
  prompt_tokens: int
  reformulated_tokens: int
  chunk_groups: int
  mesh: Any
  chip: Chip
  teacher: ModelConfig | None = None

  def _rollouts(self):
    """Abstract rollouts of every part of a step, and their group sizes."""
    parts = (api.Slots(self.method.capacity, self.method.group_size), *self.method.extra)
    found = []
    for part in parts:
      bucket = self.reformulated_tokens if part.reformulated else self.prompt_tokens
      settings = dataclasses.replace(self.sampling, group_size=part.group_size)
      found.append(jax.eval_shape(
        lambda p, b, s=settings: decode.generate(self.model, p, b, key=jax.random.key(0),
                                                 settings=s),
        params_lib.shapes(params_lib.abstract(self.model)), _prompts(part.capacity, bucket)))
    return tuple(found), tuple(p.group_size for p in parts)

  def train(self) -> Report:
    """The train step, state donated."""
    adapters = self.step_settings.adapters
    shapes = jax.eval_shape(lambda: state.create(self.model, self.method, self.optimizer, seed=0,
                                                 adapters=adapters))
    shardings = state.shardings(shapes, self.model, self.method, self.mesh, adapters)
    rollouts, sizes = self._rollouts()
    configs = {'teacher': self.teacher} if self.teacher else {}
    if adapters is not None:
      configs['base'] = self.model
    roles = {k: params_lib.shapes(params_lib.abstract(c)) for k, c in configs.items()}
    ready = prepare.make_prepare(self.model, self.method, self.step_settings, configs)
    parts = jax.eval_shape(
      lambda p, m, r, t: ready(p, m, r, jax.random.key(0), t, sizes)[1], shapes.params,
      shapes.method, rollouts, roles)
    in_step = {k: c for k, c in configs.items()
               if k == 'base' or 'teacher_hidden' in self.method.needs}
    update = step.make_train_step(self.model, self.method, self.optimizer, self.step_settings,
                                  in_step)
    roles = {k: _params(c, self.mesh) for k, c in in_step.items()}
    with jax.set_mesh(self.mesh):
      held = checkpoint.abstract(shapes, shardings)
      lowered = jax.jit(update, donate_argnums=0,
                        out_shardings=(shardings, place.replicated(self.mesh))).lower(
        held, _rows(self.mesh, parts), roles)
      forward = sum(p.rollout.tokens.size * flops.forward(
        self.model, p.rollout.tokens.shape[1], logits=False) for p in parts)
      forward += sum(p.rollout.tokens.shape[0] * self.step_settings.window * 2.0
                     * self.model.hidden * self.model.vocab for p in parts)
      return _report('train', lowered, self.mesh, self.chip,
                     parts=dict(params=held.params, optimiser=held.opt_state, **roles),
                     flops=3 * forward, executed=(4 if self.model.remat == 'full' else 3) * forward,
                     moved=memory.per_device((held.params, held.opt_state)))

  def sample(self, config: ModelConfig, name: str) -> Report:
    """One call of the sampler: at most chunk_groups groups of plain prompts."""
    slots = decode.call_slots(self.method.capacity, self.chunk_groups)
    settings = dataclasses.replace(self.sampling, group_size=self.method.group_size)
    key = _whole(self.mesh, jax.eval_shape(lambda: jax.random.key(0)))
    with jax.set_mesh(self.mesh):
      params = _params(config, self.mesh)
      lowered = decode.generate.lower(
        config, params, _rows(self.mesh, _prompts(slots, self.prompt_tokens)),
        key=key, settings=settings, version=0)
      rows, new = slots * settings.group_size, settings.max_new_tokens
      length = self.prompt_tokens + new
      total = rows * new * flops.forward(config, length)
      total += slots * self.prompt_tokens * flops.forward(config, self.prompt_tokens, logits=False)
      held = jax.eval_shape(lambda: cache_lib.init(config, rows, new).layers)
      cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held)) / self.mesh.size
      return _report(name, lowered, self.mesh, self.chip, parts=dict(params=params), flops=total,
                     executed=total, moved=new * (memory.per_device(params) + cache / 2))


def describe(config: Any, topology: str) -> Pod:
  """Shapes of a config on a topology; the config must be valid for its device count."""
  from zppo_jax.launch import build, roles, validate

  devices, chip = topology_devices(topology)
  validate.validate(config, num_devices=len(devices), aot=True)
  method = build.build_method(config)
  teacher = None
  if method.needs & {'teacher', 'teacher_hidden', 'teacher_logp'}:
    teacher = roles.architecture(config.teacher.model, config.teacher.checkpoint)
  r = config.rollout
  return Pod(
    model=roles.architecture(config.model, config.init.checkpoint), method=method,
    optimizer=state.make_optimizer(state.Optim(**config.optim)),
    step_settings=build.step_settings(config), sampling=build.sampling_settings(config, 1),
    prompt_tokens=r.prompt_tokens, reformulated_tokens=r.reformulated_tokens,
    chunk_groups=r.chunk_groups, mesh=place.make_mesh(config.mesh, devices), chip=chip,
    teacher=teacher)
