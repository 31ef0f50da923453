"""Launch recipes: text against golden files (run this file to rewrite them), quoting, bad input."""

import pathlib
import shlex
import subprocess
import sys

import pytest

from experiments.launch import print_recipe, recipes
from zppo_jax.core.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = pathlib.Path(__file__).parent / 'launch_golden'
ARGS = ('--config=ml_collections_configs/zppo.py:pod', '--workdir=/mnt/runs/zppo')
OWN = (*ARGS, '--config.optim.betas=(0.9, 0.95)')  # a value that a shell would split
TPU = dict(name='zppo-pod', zone='us-central1-a', accelerator='v5litepod-16')
GKE = dict(name='zppo-pod', cluster='pods', accelerator='v5litepod-256', image='gcr.io/p/zppo:1')
GPU = GKE | dict(accelerator='h200-141gb-8', nodes=4, zone='us-east5-b', project='lab')
SLURM = dict(name='zppo-pod', nodes=2)
CASES = {
  'tpu_vm': ('tpu_vm', OWN, TPU),
  'tpu_vm_now': ('tpu_vm', ARGS, TPU | dict(queued=False, spot=False, project='lab', image='v9')),
  'gke_tpu': ('gke', OWN, GKE),
  'gke_gpu': ('gke', ARGS, GPU),
  'slurm': ('slurm', OWN, SLURM),
  'slurm_all': ('slurm', ('--config=a.py', '--workdir=runs/a'), SLURM | dict(
    gpus_per_node=4, cpus_per_task=12, accelerator='h100', time_limit='1-12:00:00',
    partition='gpu', account='lab')),
}
NASTY = ("it's", 'a b', '$HOME `id` $(id)', '"quoted" \\ ; & | > <', 'two\nlines', '*', '', '#x')


def parses(script):
  subprocess.run(['bash', '-n'], input=script, text=True, check=True, capture_output=True)


@pytest.mark.parametrize('case', CASES)
def test_text_is_that_of_the_golden_file(case):
  text = print_recipe.render(*CASES[case])
  assert text == (GOLDEN / f'{case}.sh').read_text()
  parses(text)


def test_every_golden_file_is_compared():
  assert {p.stem for p in GOLDEN.iterdir()} == set(CASES)


def test_what_is_copied_exists():
  assert [name for name in recipes.SOURCES if not (ROOT / name).exists()] == []


def arguments(text):
  """Those of the experiment, as its process would see them: through one shell or two."""
  words = shlex.split(text, comments=True)
  commands = [w.partition('=')[2] for w in words if w.startswith('--command=')]
  words = shlex.split(commands[-1]) if commands else words
  return words[words.index('experiments.train') + 1:]


@pytest.mark.parametrize('recipe, options, values', [
  ('tpu_vm', TPU, NASTY), ('slurm', SLURM, NASTY),
  ('gke', GKE, [value for value in NASTY if '\n' not in value])])  # refused, see below
def test_values_arrive_as_they_were_given(recipe, options, values):
  for value in values:
    args = (*ARGS, f'--config.data.path={value}', value)
    text = print_recipe.render(recipe, args, options)
    parses(text)
    assert tuple(arguments(text)[:len(args)]) == args


SEPARATE = ('--config', 'zppo_jax/a.py', '--workdir', '/mnt/runs')


def test_flags_and_values_may_be_separate_words():
  for recipe, options in (('tpu_vm', TPU), ('gke', GKE), ('slurm', SLURM)):
    assert tuple(arguments(print_recipe.render(recipe, SEPARATE, options))[:4]) == SEPARATE


BAD = {
  'unknown recipe': ('slrum', ARGS, SLURM, "got 'slrum': did you mean 'slurm'"),
  'missing option': ('gke', ARGS, dict(name='a'), 'needs --cluster, --accelerator, --image'),
  'foreign option': ('slurm', ARGS, SLURM | dict(zone='z'), 'slurm does not take --zone; it takes'),
  'underscore': ('gke', ARGS, GKE | dict(name='zppo_pod'), "name must be .* got 'zppo_pod'"),
  'upper case': ('tpu_vm', ARGS, TPU | dict(name='Zppo'), "name must be .* got 'Zppo'"),
  'leading digit': ('slurm', ARGS, SLURM | dict(name='1a'), 'starting with a letter'),
  'trailing dash': ('gke', ARGS, GKE | dict(name='a-'), 'not ending with a dash'),
  'empty name': ('gke', ARGS, GKE | dict(name=''), "name must be .* got ''"),
  'long name': ('gke', ARGS, GKE | dict(name='a' * 41), 'at most 40 .* got .a{41}.'),
  'newline in a name': ('slurm', ARGS, SLURM | dict(name='a\n'), 'name must be'),
  'cluster': ('gke', ARGS, GKE | dict(cluster='my cluster'), "cluster must be .* got 'my cluster'"),
  'zone': ('tpu_vm', ARGS, TPU | dict(zone='a;b'), "zone must be .* got 'a;b'"),
  'TPU type': ('tpu_vm', ARGS, TPU | dict(accelerator='tpu7x-16'), 'v5p.* got .tpu7x-16.'),
  'TPU size': ('tpu_vm', ARGS, TPU | dict(accelerator='v6e'), "size.* got 'v6e'"),
  'device type': ('gke', ARGS, GKE | dict(accelerator='h100'), "h200-141gb-8; got 'h100'"),
  'nodes': ('gke', ARGS, GKE | dict(nodes=0), 'nodes must be at least 1; got 0'),
  'GPUs': ('slurm', ARGS, SLURM | dict(gpus_per_node=-1), 'gpus_per_node must be .* got -1'),
  'partition': ('slurm', ARGS, SLURM | dict(partition='a b'), "partition must be .* got 'a b'"),
  'no workdir': ('slurm', ARGS[:1], SLURM, '--workdir missing'),
  'nothing': ('tpu_vm', (), TPU, '--config, --workdir missing'),
  'config that stays here': ('tpu_vm', ('--config=mine/a.py', ARGS[1]), TPU, "got 'mine/a.py'"),
  'disk of one host': ('tpu_vm', (ARGS[0], '--workdir=runs/a'), TPU, "got 'runs/a'"),
  'line break in YAML': ('gke', (*ARGS, '--config.a=x\ny'), GKE, 'cannot pass on'),
  'quote in YAML': ('gke', (*ARGS, '--config.a=x"y'), GPU, 'cannot pass on \'"\''),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input(case):
  recipe, args, options, message = BAD[case]
  with pytest.raises(UserError, match=message) as error:
    print_recipe.render(recipe, args, options)
  assert '\n' not in str(error.value)


def command_line(*args):
  return subprocess.run([sys.executable, '-m', 'experiments.launch.print_recipe', *args], cwd=ROOT,
                        capture_output=True, text=True)


def test_command_line():
  options = [f'--{name}={value}' for name, value in TPU.items()]
  out = command_line('--recipe=tpu_vm', *options, '--', *ARGS, '--config.seed=3')
  assert (out.returncode, out.stderr) == (0, '')
  assert out.stdout == print_recipe.render('tpu_vm', (*ARGS, '--config.seed=3'), TPU)


@pytest.mark.parametrize('args, message', [
  (('--recipe=gkee', '--', *ARGS),
   "error: --recipe must be one of tpu_vm, gke, slurm; got 'gkee': did you mean 'gke'?\n"),
  (('--recipe=slurm', '--name=a', '--', *ARGS, '--config.sed=3'),
   "error: 'sed': did you mean 'seed'? (ml_collections_configs/zppo.py)\n"),
  (('--recipe=slurm', '--name=a', '--node=2', '--', *ARGS),
   "flag error: Unknown command line flag 'node'. Did you mean: nodes ?\n"),
])
def test_command_line_errors(args, message):
  out = command_line(*args)
  assert (out.returncode, out.stdout, out.stderr) == (2, '', message)


if __name__ == '__main__':
  for file, given in CASES.items():
    (GOLDEN / f'{file}.sh').write_text(print_recipe.render(*given))
