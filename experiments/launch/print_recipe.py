"""Prints the commands that start a run elsewhere, as a bash script; calls no cloud:

python -m experiments.launch.print_recipe --recipe=tpu_vm --name=zppo --zone=us-east5-a \
  --accelerator=v5p-128 -- --config=ml_collections_configs/zppo.py:pod --workdir=/mnt/runs/zppo

What follows -- are the arguments of experiments.train; config and overrides are checked here.
Exit status 2 for wrong input.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from experiments.launch import recipes
from zppo_jax.core.errors import UserError
from zppo_jax.launch import flags as flags_lib
from zppo_jax.launch.app import USER_ERROR

RECIPES = {'tpu_vm': recipes.tpu_vm, 'gke': recipes.gke, 'slurm': recipes.slurm}
OPTIONS = {
  'name': 'Name of the slice, workload or job.',
  'accelerator': 'v5litepod-16, v6e-64; gke also h200-141gb-8; slurm: the GPU type, or any.',
  'zone': 'Zone of the slice or cluster.',
  'project': 'Google Cloud project, if it is not the default.',
  'image': 'gke: docker image that holds the checkout; tpu_vm: software version of the VMs.',
  'cluster': 'gke: name of the cluster.',
  'time_limit': 'slurm: limit of one allocation, D-HH:MM:SS.',
  'partition': 'slurm: partition.',
  'account': 'slurm: account.',
}
COUNTS = {
  'nodes': 'gke: TPU slices or GPU machines; slurm: nodes.',
  'gpus_per_node': 'slurm: GPUs, and tasks, of a node.',
  'cpus_per_task': 'slurm: CPU cores of a task.',
}
SWITCHES = {
  'spot': 'tpu_vm: capacity that may be preempted.',
  'queued': 'tpu_vm: wait in a queue for capacity; otherwise take it now or fail.',
}


def render(recipe: str, args: Sequence[str], options: Mapping[str, Any]) -> str:
  """The script of a recipe. UserError for an unknown recipe, a missing or a foreign option."""
  if recipe not in RECIPES:
    close = difflib.get_close_matches(recipe, RECIPES, n=1, cutoff=0.0)[0]
    raise UserError(f'--recipe must be one of {", ".join(RECIPES)}; got {recipe!r}: did you mean '
                    f'{close!r}?')
  taken = {name: parameter.default is parameter.empty for name, parameter
           in inspect.signature(RECIPES[recipe]).parameters.items() if name != 'args'}
  missing = [f'--{name}' for name, required in taken.items() if required and name not in options]
  if missing:
    raise UserError(f'recipe {recipe} needs {", ".join(missing)}')
  if foreign := [f'--{name}' for name in options if name not in taken]:
    raise UserError(f'recipe {recipe} does not take {", ".join(foreign)}; it takes '
                    f'{", ".join(f"--{name}" for name in taken)}')
  return RECIPES[recipe](args=tuple(args), **options)


def define(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines --recipe and the options of all recipes; those not given keep a recipe's default."""
  flags.DEFINE_string('recipe', None, f'One of {", ".join(RECIPES)}.', values)
  for names, definer in ((OPTIONS, flags.DEFINE_string), (COUNTS, flags.DEFINE_integer),
                         (SWITCHES, flags.DEFINE_bool)):
    for name, text in names.items():
      definer(name, None, text, flag_values=values)
  flags.mark_flag_as_required('recipe', values)


def main(argv: Sequence[str]) -> int:
  values = flags.FLAGS
  given = {name: values[name].value for name in (*OPTIONS, *COUNTS, *SWITCHES)}
  try:
    text = render(values.recipe, argv[1:], {k: v for k, v in given.items() if v is not None})
    flags_lib.check_config(argv)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return USER_ERROR
  print(text, end='')
  return 0


if __name__ == '__main__':
  define()
  app.run(main, flags_parser=flags_lib.flags_parser)
