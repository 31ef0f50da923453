"""Commands that start experiments.train on a TPU slice, a GKE cluster or a SLURM cluster, as text.

Every recipe takes a name and the arguments of the experiment and returns a bash script. Nothing
here calls a cloud. A run that exits with status 42 has saved itself and asks to be started again.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from experiments.launch import checks, shell
from zppo_jax.core.errors import UserError
from zppo_jax.launch.app import PREEMPTED
from zppo_jax.launch.flags import flag_value

MODULE = 'experiments.train'
MAX_RESTARTS = 50
# What a host needs of the checkout. By name, as scp refuses `.`: "unexpected filename".
SOURCES = ('setup.py', 'pyproject.toml', 'zppo_jax', 'kernels', 'experiments',
           'ml_collections_configs')
RUNTIMES = {  # TPU generation -> software of its VMs
  'v2': 'tpu-ubuntu2204-base', 'v3': 'tpu-ubuntu2204-base', 'v4': 'tpu-ubuntu2204-base',
  'v5litepod': 'v2-alpha-tpuv5-lite', 'v5p': 'v2-alpha-tpuv5', 'v6e': 'v2-alpha-tpuv6e'}


def tpu_vm(name: str, args: Sequence[str], *, accelerator: str, zone: str, project: str = '',
           image: str = '', spot: bool = True, queued: bool = True) -> str:
  """One slice of Cloud TPU VMs; `image` is its software version, by default that of its type."""
  args = checks.experiment(args, shared=True)
  checks.copied(flag_value(['', *args], 'config'), SOURCES)
  checks.name('name', name)
  zone = (f'--zone={checks.name("zone", zone)}', *shell.optional('project', project))
  kind = (f'--accelerator-type={accelerator}',)
  version = image or _runtime(accelerator)
  spare = ('--spot',) if spot else ()
  vm, queue = (('gcloud', 'compute', 'tpus', noun) for noun in ('tpu-vm', 'queued-resources'))
  ssh = (*vm, 'ssh', name, *zone, '--worker=all')
  command = shlex.join(('bash', 'experiments/launch/run_tpu.sh', MODULE, *args))
  if queued:
    start = (shell.lines((*queue, 'create', name, *zone), (f'--node-id={name}', *kind),
                         (f'--runtime-version={version}', *spare)),
             _wait((*queue, 'describe', name, *zone, '--format=value(state.state)')))
    end = (*queue, 'delete', name, *zone, '--force', '--quiet')
  else:
    start = (shell.lines((*vm, 'create', name, *zone), (*kind, f'--version={version}', *spare)),)
    end = (*vm, 'delete', name, *zone, '--quiet')
  return shell.script(
    *start,
    shell.lines(ssh, ('--command=mkdir -p zppo_jax',)),
    shell.lines((*vm, 'scp', '--recurse', *zone, '--worker=all'), SOURCES, (f'{name}:zppo_jax',)),
    '# The same command on every host. Called again, it continues the run.\n'
    + shell.lines(ssh, (f'--command=cd zppo_jax && {command}',)),
    f'# At the end, and after a preemption before the next start:\n# {shell.line(end)}')


def gke(name: str, args: Sequence[str], *, cluster: str, accelerator: str, image: str,
        nodes: int = 1, zone: str = '', project: str = '') -> str:
  """A workload of xpk; `image` holds the checkout, `nodes` are TPU slices or GPU machines."""
  args = checks.experiment(args, shared=True)
  checks.count('nodes', nodes)
  tpu = re.fullmatch(r'(v\d+[a-z]*|tpu\d+x)-\d+(x\d+)*', accelerator)
  if not tpu and not re.fullmatch(r'[a-z]+\d+(-[a-z0-9]+)*-\d+', accelerator):
    raise UserError('accelerator must be a TPU type such as v5litepod-16 or a GPU type such as '
                    f'h200-141gb-8; got {accelerator!r}')
  # exec: the signal that announces the end of a pod must reach Python, not a shell around it.
  command = 'exec ' + shlex.join(('python', '-m', MODULE, *args))
  refused = '\n' if tpu else '\n"\\'  # xpk writes the command into YAML; for GPUs between "
  if bad := sorted(set(refused) & set(command)):
    raise UserError(f'arguments of the experiment: xpk cannot pass on {", ".join(map(repr, bad))} '
                    f'in a shell command for {accelerator}; got {command!r}')
  if tpu:
    kind = (f'--tpu-type={accelerator}', f'--num-slices={nodes}')
  else:
    kind = (f'--device-type={accelerator}', f'--num-nodes={nodes}')
    command += (' --coordinator_address=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT'
                ' --num_processes=$NNODES --process_id=$NODE_RANK')  # set by xpk
  return shell.script(shell.lines(
    ('xpk', 'workload', 'create', f'--workload={checks.name("name", name)}'),
    (f'--cluster={checks.name("cluster", cluster)}', *shell.optional('zone', zone),
     *shell.optional('project', project)),
    kind, (f'--docker-image={image}',), ('--priority=medium',),
    (f'--max-restarts={MAX_RESTARTS}', f'--restart-on-exit-codes={PREEMPTED}'),
    ('--termination-grace-period-seconds=300',), (f'--command={command}',)))


def slurm(name: str, args: Sequence[str], *, nodes: int = 1, gpus_per_node: int = 8,
          cpus_per_task: int = 8, accelerator: str = '', time_limit: str = '', partition: str = '',
          account: str = '') -> str:
  """A batch script for sbatch; `accelerator` is the GPU type as the cluster calls it, or any."""
  args = checks.experiment(args, shared=False)
  checks.count('nodes', nodes)
  checks.count('gpus_per_node', gpus_per_node)
  checks.count('cpus_per_task', cpus_per_task)
  gpus = f'{checks.word("accelerator", accelerator)}:' if accelerator else ''
  given = (('time', 'time_limit', time_limit), ('partition', 'partition', partition),
           ('account', 'account', account))
  header = {'job-name': checks.name('name', name), 'output': f'{name}-%j.out', 'nodes': nodes,
            'ntasks-per-node': gpus_per_node, 'gpus-per-node': f'{gpus}{gpus_per_node}',
            'cpus-per-task': cpus_per_task, 'signal': 'TERM@120', 'open-mode': 'append'}
  header |= {key: checks.word(argument, value) for key, argument, value in given if value}
  directives = [f'#SBATCH --{key}={value}' for key, value in header.items()]
  return '\n'.join(['#!/usr/bin/env bash', *directives, '#SBATCH --requeue', '', _SLURM.format(
    command=shlex.join(('python', '-m', MODULE, *args)), preempted=PREEMPTED,
    cpus_per_task=cpus_per_task, max_restarts=MAX_RESTARTS)])


# --gpus-per-task would hide the other GPUs of a node, by whose local number JAX picks one. A task
# that has saved exits with 42 and must not end those that still save: --kill-on-bad-exit=0.
_SLURM = """\
# One task per GPU. Submit from the checkout, in an environment with '.[gpu]' installed.
srun --cpus-per-task={cpus_per_task} --kill-on-bad-exit=0 --wait=600 \\
  {command}
status=$?
if [ "$status" -eq {preempted} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_restarts} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def _wait(describe: Sequence[str]) -> str:
  return (f'while state=$({shell.lines(describe[:-1], describe[-1:])})\n'
          '      [ "$state" != ACTIVE ]; do\n'
          '  echo "$state"\n'
          '  case "$state" in FAILED | SUSPENDED) exit 1 ;; esac\n'
          '  sleep 30\n'
          'done')


def _runtime(accelerator: str) -> str:
  generation = accelerator.partition('-')[0]
  if generation not in RUNTIMES or not re.fullmatch(r'\w+-\d+', accelerator, re.ASCII):
    raise UserError(f'accelerator must be one of {", ".join(RUNTIMES)} with a size, such as '
                    f'v5litepod-16 (newer TPUs: recipe gke); got {accelerator!r}')
  return RUNTIMES[generation]
