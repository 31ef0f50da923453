"""Ahead-of-time compilation of a config for a TPU topology, on any host: does it fit, what does it
cost.

Needs the `libtpu` wheel (extra `aot`); no TPU. Nothing is allocated.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zppo_jax.core.errors import UserError
from zppo_jax.mesh import axes, place
from zppo_jax.methods import api
from zppo_jax.models import params as params_lib
from zppo_jax.models.config import ModelConfig
from zppo_jax.sampling import decode
from zppo_jax.train import checkpoint, prepare, state, step

HBM_BYTES = {'v5e': 16 << 30, 'v5p': 95 << 30, 'v6e': 32 << 30}  # per chip


@dataclasses.dataclass(frozen=True)
class Report:
  """What the compiler says of one program, per chip."""

  name: str
  argument_bytes: int
  temp_bytes: int
  output_bytes: int
  alias_bytes: int
  flops: float
  hbm_bytes: int

  @property
  def total_bytes(self) -> int:
    return self.argument_bytes + self.temp_bytes + self.output_bytes - self.alias_bytes

  @property
  def fits(self) -> bool:
    return self.total_bytes <= self.hbm_bytes

  def line(self) -> str:
    gib = [x / 2**30 for x in (self.argument_bytes, self.temp_bytes, self.total_bytes,
                               self.hbm_bytes)]
    verdict = 'fits' if self.fits else 'DOES NOT FIT'
    return (f'{self.name:10s} arguments {gib[0]:7.2f} GiB  temporaries {gib[1]:7.2f} GiB  total '
            f'{gib[2]:7.2f} of {gib[3]:.0f} GiB per chip: {verdict}; {self.flops:.3g} flops')


def topology_devices(name: str) -> tuple[Sequence[Any], int]:
  """(devices, HBM bytes per chip) of 'v5p:4x4x4'. Raises UserError on a malformed or unknown
  name."""
  generation, _, shape = name.partition(':')
  if generation not in HBM_BYTES or not all(x.isdigit() for x in shape.split('x')):
    raise UserError(f'topology: {name!r} is not GENERATION:AxB or :AxBxC with GENERATION in '
                    f'{sorted(HBM_BYTES)}')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  from jax.experimental import topologies

  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=name).devices, \
      HBM_BYTES[generation]
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


def _report(name: str, compiled, hbm_bytes: int) -> Report:
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  cost = cost[0] if isinstance(cost, list) else cost
  return Report(name, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
                memory.output_size_in_bytes, memory.alias_size_in_bytes,
                float((cost or {}).get('flops', 0.0)), hbm_bytes)


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
  hbm_bytes: int
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
    shapes = jax.eval_shape(lambda: state.create(self.model, self.method, self.optimizer, seed=0))
    shardings = state.shardings(shapes, self.model, self.method, self.mesh)
    rollouts, sizes = self._rollouts()
    configs = {'teacher': self.teacher} if self.teacher else {}
    roles = {k: params_lib.shapes(params_lib.abstract(c)) for k, c in configs.items()}
    ready = prepare.make_prepare(self.model, self.method, self.step_settings, configs)
    parts = jax.eval_shape(
      lambda p, m, r, t: ready(p, m, r, jax.random.key(0), t, sizes)[1], shapes.params,
      shapes.method, rollouts, roles)
    in_step = 'teacher_hidden' in self.method.needs
    update = step.make_train_step(self.model, self.method, self.optimizer, self.step_settings,
                                  configs if in_step else {})
    roles = {'teacher': _params(self.teacher, self.mesh)} if in_step else {}
    with jax.set_mesh(self.mesh):
      lowered = jax.jit(update, donate_argnums=0,
                        out_shardings=(shardings, place.replicated(self.mesh))).lower(
        checkpoint.abstract(shapes, shardings), _rows(self.mesh, parts), roles)
      return _report('train', lowered.compile(), self.hbm_bytes)

  def sample(self, config: ModelConfig, name: str) -> Report:
    """One call of the sampler: at most chunk_groups groups of plain prompts."""
    slots = decode.call_slots(self.method.capacity, self.chunk_groups)
    settings = dataclasses.replace(self.sampling, group_size=self.method.group_size)
    key = _whole(self.mesh, jax.eval_shape(lambda: jax.random.key(0)))
    with jax.set_mesh(self.mesh):
      lowered = decode.generate.lower(
        config, _params(config, self.mesh), _rows(self.mesh, _prompts(slots, self.prompt_tokens)),
        key=key, settings=settings, version=0)
      return _report(name, lowered.compile(), self.hbm_bytes)


def describe(config: Any, topology: str) -> Pod:
  """Shapes of a config on a topology; the config must be valid for its device count."""
  from zppo_jax.launch import build, roles, validate

  devices, hbm = topology_devices(topology)
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
    chunk_groups=r.chunk_groups, mesh=place.make_mesh(config.mesh, devices), hbm_bytes=hbm,
    teacher=teacher)
