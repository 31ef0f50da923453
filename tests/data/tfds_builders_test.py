import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
from zppo_jax.data import prepare
from zppo_jax.data.tasks import sources
from zppo_jax.data import batches, files, jinja_templates, subwords, templates, train_tokenizer

data_dir, out = sys.argv[1], {}
plain = {'zppo_arith': 'arithmetic', 'zppo_modmath': 'modmath', 'zppo_countdown': 'countdown'}
from zppo_jax.data import tfds_builders
for name, task in plain.items():
  out[name] = prepare.prepare(f'{name}/tiny', data_dir)
  settings = next(c for c in tfds_builders.BUILDERS[name].BUILDER_CONFIGS if c.name == 'tiny')
  equal = True
  for split, size in out[name].items():
    read = sources.build_source(
      {'name': 'tfds', 'dataset': f'{name}/tiny', 'data_dir': data_dir, 'split': split})
    live = sources.build_source(
      {'name': task, 'split': split, 'size': size, **settings.settings})
    assert len(read) == len(live) == size
    equal = equal and all(read[i] == live[i] for i in range(size))
    equal = equal and all(read.distractor(i) == live.distractor(i) for i in range(5))
  out[name]['equal'] = equal
out['tensorflow'] = 'tensorflow' in sys.modules
print(json.dumps(out))
"""


def test_round_trip_without_tensorflow(tmp_path):
  command = [sys.executable, '-c', PROGRAM, str(tmp_path)]
  result = subprocess.run(command, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr[-2000:]
  found = json.loads(result.stdout.splitlines()[-1])
  assert found.pop('tensorflow') is False
  sizes = {'train': 200, 'validation': 50, 'test': 50, 'ood': 50, 'equal': True}
  assert found == dict.fromkeys(['zppo_arith', 'zppo_modmath', 'zppo_countdown'], sizes)


def test_prepare_command_and_errors(tmp_path):
  from zppo_jax.data import tfds_builders
  from zppo_jax.data.tasks import sources

  spec = {'name': 'tfds', 'dataset': 'zppo_arith/tiny', 'data_dir': str(tmp_path)}
  with pytest.raises(FileNotFoundError, match='zppo_jax.data.prepare --dataset=zppo_arith/tiny'):
    sources.build_source(spec)
  command = [sys.executable, '-m', 'zppo_jax.data.prepare', '--dataset=zppo_arith/tiny']
  subprocess.run([*command, f'--data_dir={tmp_path}'], check=True, capture_output=True)
  assert len(sources.build_source(spec)) == 200
  with pytest.raises(IndexError, match='200'):
    sources.build_source(spec)[200]
  with pytest.raises(ValueError, match="closest is 'zppo_arith'"):
    tfds_builders.builder('zppo_arit', tmp_path)
  with pytest.raises(ValueError, match="closest is 'easy'"):
    tfds_builders.builder('zppo_arith/eazy', tmp_path)


@pytest.mark.parametrize('name', ['zppo_arith', 'zppo_modmath', 'zppo_countdown'])
def test_every_config_generates(name, tmp_path):
  from zppo_jax.data import tfds_builders
  from zppo_jax.data.tasks import sources

  for config in tfds_builders.BUILDERS[name].BUILDER_CONFIGS:
    task = tfds_builders.builder(f'{name}/{config.name}', tmp_path).TASK
    for split in ('train', 'ood'):
      example = sources.build_task(task, split=split, **config.settings)[3]
      assert example.answer and example.solution
