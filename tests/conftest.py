"""Eight virtual CPU devices for the whole session, set before anything imports jax."""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Threads of the CPU client. Eight devices wait in several collectives at once, and a thread waits
# with each: a pool as small as the machine runs dry, and the process is aborted.
os.environ.setdefault('PJRT_NPROC', '32')
_FLAGS = {'--xla_force_host_platform_device_count': '8'}
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  # Tests spend their time in the compiler, and the older emitters compile three times as fast. An
  # unknown flag would abort the process, hence only where it is known to exist.
  _FLAGS['--xla_cpu_use_fusion_emitters'] = 'false'
for _name, _value in _FLAGS.items():
  if _name not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_name}={_value}'.strip()

# In this order, a whole module on one worker, so that its fixtures and programs are made once.
_LONG = ('shared_test.py', 'loop_test.py', 'golden_test.py', 'quickstart_test.py', 'sparse_test.py',
         'accuracy_test.py', 'zppo_test.py', 'zppo_miniature_test.py', 'published_test.py',
         'grpo_test.py', 'engine_test.py', 'architectures_test.py')
# Small programs, whose compiling is the cost of their tests.
_QUICK_FOLDERS = {'agents', 'evals', 'experiments', 'kernels', 'methods', 'models', 'ops', 'replay',
                  'sampling', 'train'}


def pytest_configure(config):
  """Compiled programs of one session are shared by its workers and their child processes."""
  if not hasattr(config, 'workerinput') and 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    folder = tempfile.mkdtemp(prefix='zppo_jax_tests_')  # workers inherit the environment
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')


def pytest_collection_modifyitems(items):
  """Marks the costly tests of a module as slow, but for the parameters that its COSTLY names; long
  modules first: at the end one worker would wait for them."""
  for item in items:
    quick = getattr(item.module, 'COSTLY', {}).get(item.originalname)
    if quick is not None:
      known = {item.callspec.id} | {x for x in item.callspec.params.values() if isinstance(x, str)}
      if not known & set(quick):
        item.add_marker(pytest.mark.slow)
  order = {name: at for at, name in enumerate(_LONG)}
  items.sort(key=lambda item: order.get(item.path.name, len(_LONG)))


@pytest.fixture(scope='module', autouse=True)
def _quick_compiles(request):
  """Compiles without most optimisations, in folders where no property needs fast code."""
  import jax  # after the environment is set

  inside = pathlib.Path(request.path).relative_to(pathlib.Path(__file__).parent)
  if inside.parts[0] not in _QUICK_FOLDERS:
    yield
    return
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module', autouse=True)
def _forget_programs():
  """Traces and programs of a module go with it: a worker would grow to gigabytes and slow down."""
  yield
  import jax

  jax.clear_caches()
  gc.collect()

