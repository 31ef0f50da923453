"""Eight virtual CPU devices and one compilation cache for the session, before anything imports jax."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
_DEVICES = '--xla_force_host_platform_device_count'
if _DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}=8'.strip()
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  # Methods that share a train step compile it once, although each builds its own closures.
  _FOLDER = tempfile.mkdtemp(prefix='zppo_jax_test_cache_')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _FOLDER
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
  atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
