"""Pod configs compiled for their pods on this host; needs libtpu, no TPU.

In processes of their own: libtpu stops at any XLA flag that it does not know.
"""

import re

import child
import pytest

from zppo_jax.core.errors import UserError
from zppo_jax.launch import aot

pytest.importorskip('libtpu')
QUICK = {'JAX_OPTIMIZATION_LEVEL': 'O0'}  # without the optimisations that take most of the time
# The pod's program on shorter rows and fewer groups, by a student without linear attention (each
# kernel takes seconds).
SHORT = ('--config.model.preset=qwen3-0.6b', '--config.rollout.prompt_tokens=512',
         '--config.rollout.max_new_tokens=512', '--config.method.num_new=128',
         '--config.method.iterations=2', '--config.train.micro_batches=4')
REFORMULATED = ('--config.rollout.reformulated_tokens=1024', '--config.method.compress=tail',
                '--config.method.compress_tokens=16')


def launch_pod(tmp_path, *extra, config='zppo', settings=()):
  return child.run(
    '-m', 'experiments.launch_pod', '--aot_only', '--topology=v5p:4x4x4',
    f'--config=ml_collections_configs/{config}.py:pod', f'--workdir={tmp_path}', *extra,
    **dict(settings))


def check(done, *programs, topology='v5p:4x4x4'):
  assert done.returncode == 0, done.stdout + done.stderr[-2000:]
  lines = done.stdout.splitlines()
  assert lines[0].startswith(f'{topology}: ')
  assert [line.split()[0] for line in lines[1:]] == list(programs)
  for line in lines[1:]:
    assert re.search(r'\(params .* GiB per device: fits; .* flops, at least .* s \(MFU at', line)


SOME_LAYERS = """
import dataclasses, importlib, sys
from zppo_jax.launch import aot
config, preset, layers, *programs = sys.argv[1:]
extra = {'rollout.reformulated_tokens': 1024, 'method.compress': 'tail',
         'method.compress_tokens': 16} if config == 'zppo' else {}
config = importlib.import_module(f'ml_collections_configs.{config}').get_config('pod')
config.update_from_flattened_dict(extra | {
  'model.preset': preset, 'rollout.prompt_tokens': 512, 'rollout.max_new_tokens': 512,
  'method.num_new': 128, 'method.iterations': 2, 'train.micro_batches': 4})
pod = aot.describe(config, 'v5p:4x4x4')
if layers != 'all':
  few = dataclasses.replace(pod.model, layers=int(layers), mixers=pod.model.mixers[-int(layers):])
  pod = dataclasses.replace(pod, model=few)
for name in programs:
  report = pod.train() if name == 'train' else pod.sample(pod.model, name)
  assert report.fits
  print(report.line())
"""


@pytest.mark.aot
def test_sampling_of_two_layers_compiles_and_fits():
  """The whole sampler of a pod, cut in depth; a train step takes the compiler four times longer."""
  line = child.answer('-c', SOME_LAYERS, 'grpo', 'qwen3-0.6b', '2', 'sample', **QUICK)
  assert line.split()[0] == 'sample'


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize('config, extra', [('grpo', ()), ('zppo', REFORMULATED)])
def test_train_step_and_sampling_of_short_rows_compile_and_fit(tmp_path, config, extra):
  check(launch_pod(tmp_path, '--programs=train,sample', *SHORT, *extra, config=config,
                   settings=QUICK), 'train', 'sample')


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize('student, topology', [
  ('qwen3.5-2b', 'v5p:4x4x4'), ('qwen3.5-0.8b', 'v5p:4x4x4'), ('qwen3.5-9b', 'v5p:4x4x4'),
  ('qwen3.5-0.8b', 'v6e:16x16'), ('qwen3.5-9b', 'v6e:16x16')])
def test_every_published_program_compiles_and_fits(tmp_path, student, topology):
  """Student step, student sampling and sampling of the 27B teacher."""
  # Four times the chips hold four times the rows at once; with a third of the memory, rows are cut.
  extra = () if topology == 'v5p:4x4x4' else ('--config.train.micro_batches=3',)
  if (student, topology) == ('qwen3.5-9b', 'v6e:16x16'):
    extra = '--config.train.micro_batches=6', '--config.mesh.context=2'
  done = launch_pod(tmp_path, f'--topology={topology}', f'--config.model.preset={student}', *extra,
                    settings=QUICK)
  check(done, 'train', 'sample', 'teacher', topology=topology)


def test_a_wrong_mesh_is_refused_before_compiling(tmp_path):
  done = launch_pod(tmp_path, '--config.mesh.tensor=5')
  assert done.returncode == 2 and 'must equal the device count, 64' in done.stderr


@pytest.mark.parametrize('name', ['v5p', 'v9:2x2', 'v5p:4xx4', 'v5p:4x-4'])
def test_malformed_topology_is_named(name):
  with pytest.raises(UserError, match='topology'):
    aot.topology_devices(name)


@pytest.mark.aot
@pytest.mark.slow
def test_64_layers_compile_in_twice_the_time_of_two():
  found = {}
  for layers in ('2', 'all'):
    line = child.answer('-c', SOME_LAYERS, 'zppo', 'qwen3.5-27b', layers, 'train', **QUICK)
    found[layers] = float(re.search(r'compiled in (\d+) s', line)[1])
  assert found['all'] <= 2 * found['2'], found
