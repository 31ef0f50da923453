"""The house rules that a machine can check: import direction, budgets, names, heavy imports."""

import ast
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAYERS = {
  'zppo_jax.core': 0, 'zppo_jax.ops': 1, 'kernels': 1, 'zppo_jax.mesh': 2, 'zppo_jax.models': 2,
  'zppo_jax.data': 3, 'zppo_jax.sampling': 3, 'zppo_jax.rewards': 3, 'zppo_jax.replay': 3,
  'zppo_jax.methods': 4, 'zppo_jax.envs': 4, 'zppo_jax.agents': 4,
  'zppo_jax.train': 5, 'zppo_jax.evals': 5, 'zppo_jax.launch': 6,
  'experiments': 6, 'ml_collections_configs': 6}
METHOD_FILES = {'grpo', 'ppo', 'sft', 'zppo', 'distill'}


def modules():
  for package in ('zppo_jax', 'kernels', 'experiments', 'ml_collections_configs'):
    for path in sorted((ROOT / package).rglob('*.py')):
      name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
      yield name.removesuffix('.__init__'), path


def imports(path):
  """Every imported module, those inside functions too; `from a import b` counts as a.b."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def room(name):
  return next((r for r in LAYERS if name == r or name.startswith(r + '.')), None)


ALL = dict(modules())


def test_every_module_has_a_layer():
  assert [m for m in ALL if m != 'zppo_jax' and room(m) is None] == []


@pytest.mark.parametrize('name', ALL)
def test_imports_point_downwards(name):
  own = room(name)
  for target in imports(ALL[name]):
    other = room(target)
    if own and other and other != own:
      same_floor = LAYERS[other] == LAYERS[own] and LAYERS[own] not in (1,)
      assert LAYERS[other] < LAYERS[own] or same_floor, f'{name} imports {target}'


def test_rooms_of_one_floor_have_no_cycles():
  edges = {}
  for name, path in ALL.items():
    for target in imports(path):
      if room(target) and room(target) != room(name):
        edges.setdefault(room(name), set()).add(room(target))
  for a, targets in edges.items():
    for b in targets:
      assert a not in edges.get(b, ()), f'{a} and {b} import each other'


def test_methods_never_import_each_other():
  for method in METHOD_FILES:
    found = {t.split('.')[2] for t in imports(ROOT / f'zppo_jax/methods/{method}.py')
             if t.startswith('zppo_jax.methods.')}
    assert not found & METHOD_FILES, (method, found)


def test_what_methods_share_imports_no_method():
  """Only the table knows them all."""
  for name, path in ALL.items():
    if room(name) == 'zppo_jax.methods' and name.split('.')[-1] not in METHOD_FILES | {'table'}:
      found = {t.split('.')[2] for t in imports(path) if t.startswith('zppo_jax.methods.')}
      assert not found & (METHOD_FILES | {'table'}), (name, found)


def test_configs_import_nothing_but_ml_collections():
  for name, path in ALL.items():
    if name.startswith('ml_collections_configs'):
      assert {t.split('.')[0] for t in imports(path)} <= {'ml_collections',
                                                           'ml_collections_configs'}, name


def test_shared_machinery_never_names_a_method():
  names = {'zppo', 'grpo', 'ppo', 'dapo', 'gspo', 'cispo', 'rloo', 'distill_on', 'distill_off'}
  for name, path in ALL.items():
    if room(name) in ('zppo_jax.train', 'zppo_jax.sampling', 'zppo_jax.rewards'):
      strings = [n.value for n in ast.walk(ast.parse(path.read_text()))
                 if isinstance(n, ast.Constant) and isinstance(n.value, str)]
      assert not names & set(strings), name


def _words(path):
  """Words of all identifiers and of all strings that are not docstrings."""
  tree = ast.parse(path.read_text())
  docs = {id(n.body[0].value) for n in ast.walk(tree)
          if isinstance(n, (ast.Module, ast.FunctionDef, ast.ClassDef)) and n.body
          and isinstance(n.body[0], ast.Expr)}
  for node in ast.walk(tree):
    for field in ('id', 'attr', 'name', 'arg', 'asname', 'module'):
      yield from re.split(r'\W+', str(getattr(node, field, '') or ''))
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
      yield from re.split(r'\W+', node.value)


def test_no_row_of_the_table_is_a_word_in_shared_machinery():
  """Names and strings of train, sampling and rewards: a branch on a method could hide nowhere."""
  from zppo_jax.methods import table
  rooms = ('zppo_jax.train', 'zppo_jax.sampling', 'zppo_jax.rewards')
  for name, path in ALL.items():
    if room(name) in rooms:
      assert not set(table.METHODS) & set(_words(path)), name
  assert 'grpo' in set(_words(ALL['zppo_jax.methods.table']))


def test_jax_experimental_stays_in_kernels_and_aot():
  found = [n for n, p in ALL.items() if any(t.startswith('jax.experimental') for t in imports(p))]
  # The worker runs in a virtualenv of its own, without this project.
  aot = {'zppo_jax.launch.aot', 'experiments.bench_kernels_tokamax'}
  # How logical axes lie on a torus has no other interface.
  assert set(found) <= aot | {'zppo_jax.mesh.place'} | {n for n in found if n.startswith('kernels')}


def test_no_heavy_import_at_import_time():
  """Importing every module of the library brings in neither TensorFlow nor torch nor flax."""
  code = ('import importlib, sys\n'
          f'for m in {[n for n in ALL if n.startswith("zppo_jax")]!r}: importlib.import_module(m)\n'
          "bad = {'tensorflow', 'torch', 'flax', 'transformers', 'sympy', 'matplotlib'}\n"
          'print(sorted(bad & set(sys.modules)))')
  out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                       check=True)
  assert out.stdout.strip() == '[]', out.stdout


@pytest.mark.parametrize('name', ALL)
def test_modules_and_functions_stay_small(name):
  text = ALL[name].read_text()
  assert len(text.splitlines()) <= 330, f'{name} has {len(text.splitlines())} lines'
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef):
      size = node.end_lineno - node.lineno + 1
      assert size <= 60, f'{name}.{node.name} has {size} lines'


def test_every_field_of_a_method_config_is_read():
  source = '\n'.join(p.read_text() for n, p in ALL.items() if n.startswith('zppo_jax'))
  import dataclasses

  from zppo_jax.methods import common, table
  for config in {type(row.defaults) for row in table.METHODS.values()} | {common.PolicyLoss}:
    for field in dataclasses.fields(config):
      assert re.search(rf'\.{field.name}\b', source) or (
        config is not common.PolicyLoss and field.name in
        {f.name for f in dataclasses.fields(common.PolicyLoss)}), (config, field.name)


def test_every_field_of_a_method_config_is_read_by_its_builder():
  """In the file of the method or in one it shares, on the config itself: `c.field`."""
  import inspect

  from zppo_jax.methods import common, table
  shared = [ALL[f'zppo_jax.methods.{m}'].read_text() for m in ('guidance', 'second_phase')]
  for row in table.METHODS.values():
    own = pathlib.Path(inspect.getfile(row.build)).read_text()
    for field in vars(row.defaults):
      read = any(re.search(rf'\b(c|self)\.{field}\b', text) for text in (own, *shared))
      passed_on = field in vars(common.PolicyLoss()) and 'policy_loss(' in own
      assert read or passed_on, (row.build.__module__, field)


def test_packages_are_found():
  assert 'train' in {m.name for m in pkgutil.iter_modules([str(ROOT / 'zppo_jax')])}
