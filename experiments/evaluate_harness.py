"""Runs tasks of EleutherAI's lm-evaluation-harness (extra 'eval') on a checkpoint:

python -m experiments.evaluate_harness --checkpoint=runs/zppo --tasks=gsm8k,arc_easy --out=out.json

The checkpoint is the workdir of a run or a published folder. `--include_path` adds a folder of task
files. Prints the harness's table; `--out` holds all that it reports.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from zppo_jax.core.errors import UserError
from zppo_jax.launch import flags as flags_lib
from zppo_jax.launch.app import USER_ERROR


def build_lm(own: Any, *, max_length: int, slots: int, tokens_per_call: int, seed: int,
             chat: bool = False, **options: Any):
  """The harness's LM over a `roles.Policy`. Raises UserError on a chat without a template."""
  import jax

  from zppo_jax.agents import policy
  from zppo_jax.evals import lm_eval_adapter
  from zppo_jax.sampling import conversations

  if max_length < 2:
    raise UserError(f'--max_length must be at least 2, got {max_length}')
  if chat and own.template is None:
    raise UserError('--apply_chat_template: the checkpoint came without a template')
  client = policy.PolicyClient(
    own.config, own.params, own.tokenizer, own.template or 'plain', key=jax.random.key(seed),
    max_new_tokens=max_length - 1, shape=conversations.Shape(slots=slots, context=max_length))
  score = functools.partial(lm_eval_adapter.score, own.config, own.params,
                            tokens_per_call=tokens_per_call)
  return lm_eval_adapter.adapter(
    client, own.tokenizer, score=score, max_length=max_length, seed=seed,
    template=own.template if chat else None, requests_per_call=4 * slots, **options)


def find_tasks(names: Sequence[str], include_path: str | None):
  """(names with patterns resolved, the harness's TaskManager). Raises UserError on unknown ones."""
  from lm_eval.tasks import TaskManager

  if not names:
    raise UserError('--tasks: name at least one')
  if include_path and not os.path.isdir(include_path):
    raise UserError(f'--include_path: no folder {include_path!r}')
  unknown: list[str] = []
  # The harness reads thousands of files to index its own tasks: only if they are asked for.
  for defaults in (False, True) if include_path else (True,):
    manager = TaskManager(include_path=include_path, include_defaults=defaults)
    found = {name: manager.match_tasks([name]) for name in names}
    unknown = [name for name, matches in found.items() if not matches]
    if not unknown:
      return sorted({m for matches in found.values() for m in matches}), manager
  close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=1)
  hint = f', did you mean {close[0]!r}?' if close else ''
  raise UserError(f'--tasks: unknown {", ".join(unknown)}{hint}')


def evaluate(checkpoint: str, tasks: Sequence[str], *, include_path: str | None = None,
             limit: int | None = None, num_fewshot: int | None = None, log_samples: bool = False,
             mesh: Sequence[str] = ('data=-1',), dtype: str | None = None, max_length: int = 4096,
             chat: bool = False, seed: int = 0, **options: Any) -> dict[str, Any]:
  """What `lm_eval.simple_evaluate` returns; `options` are those of `build_lm`. Raises UserError."""
  if importlib.util.find_spec('lm_eval') is None:
    raise UserError("the harness is not installed: pip install 'zppo_jax[eval]'")
  import jax
  import lm_eval

  from zppo_jax.launch import roles
  from zppo_jax.mesh import place

  names, manager = find_tasks(tasks, include_path)
  try:
    shape = {name: int(size) for name, _, size in (part.partition('=') for part in mesh)}
    devices = place.make_mesh(shape)
  except ValueError as error:
    raise UserError(f'--mesh: {error}') from error
  own = roles.load_with_tokenizer(checkpoint, devices, dtype)
  max_length = min(max_length, own.config.context)
  facts = dict(checkpoint=os.path.abspath(checkpoint), max_length=max_length,
               tokenizer=own.tokenizer.fingerprint)
  with jax.set_mesh(devices):
    lm = build_lm(own, max_length=max_length, chat=chat, seed=seed, **options)
    return lm_eval.simple_evaluate(
      lm, model_args=facts, tasks=names, task_manager=manager, limit=limit,
      num_fewshot=num_fewshot, apply_chat_template=chat, log_samples=log_samples)


def define(values: flags.FlagValues = flags.FLAGS) -> None:
  for name, default, text in (
      ('checkpoint', None, 'Workdir of a run, or a published checkpoint folder.'),
      ('include_path', None, 'Folder with task files of your own.'),
      ('out', None, 'File for the results, JSON.')):
    flags.DEFINE_string(name, default, text, values)
  flags.DEFINE_enum('dtype', None, ('float32', 'bfloat16', 'float16'),
                    'Of a published checkpoint; default: as its config.json says.', values)
  for name, default, text in (
      ('limit', None, 'Documents per task; default: all.'),
      ('num_fewshot', None, 'Worked examples before each document; default: as the task says.'),
      ('max_length', 4096, "Tokens of context and answer, at most the model's."),
      ('max_gen_toks', 256, 'Tokens of an answer where a task does not say.'),
      ('slots', 16, 'Answers that are drawn at once.'),
      ('tokens_per_call', 4096, 'Tokens that are scored at once.')):
    flags.DEFINE_integer(name, default, text, lower_bound=0 if name == 'num_fewshot' else 1,
                         flag_values=values)
  flags.DEFINE_integer('seed', 0, 'Of sampled answers.', flag_values=values)
  flags.DEFINE_list('tasks', None, 'Tasks, groups, tags or patterns of the harness.', values)
  flags.DEFINE_list('mesh', ['data=-1'], 'Axes of the mesh, AXIS=SIZE.', values)
  for name, text in (('apply_chat_template', "Render documents by the policy's chat template."),
                     ('add_bos', 'Begin every context with bos, as Llama and Gemma want it.'),
                     ('log_samples', 'Keep every document and answer in --out.')):
    flags.DEFINE_bool(name, False, text, values)
  flags.mark_flags_as_required(['checkpoint', 'tasks'], values)


def main(argv: Sequence[str]) -> int:
  v = flags.FLAGS
  same = ('include_path', 'limit', 'num_fewshot', 'log_samples', 'mesh', 'dtype', 'max_length',
          'seed', 'max_gen_toks', 'slots', 'tokens_per_call', 'add_bos')
  try:
    if len(argv) > 1:
      raise UserError(f'unexpected argument {argv[1]!r}: flags start with --')
    if v.out and not os.path.isdir(os.path.dirname(os.path.abspath(v.out))):
      raise UserError(f'--out: no folder {os.path.dirname(v.out)!r}')
    found = evaluate(v.checkpoint, v.tasks, chat=v.apply_chat_template,
                     **{name: v[name].value for name in same})
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return USER_ERROR
  from lm_eval import utils

  if v.out:
    with open(v.out, 'w', encoding='utf-8') as file:
      json.dump(found, file, indent=2, default=utils.handle_non_serializable)
  print(utils.make_table(found))
  return 0


if __name__ == '__main__':
  import jax

  define()
  jax.config.config_with_absl()  # defines --jax_*; app.run applies them
  app.run(main, flags_parser=flags_lib.flags_parser)
