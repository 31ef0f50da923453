"""Named key folding: every random number has an address, never a place in a sequence."""

import zlib

import jax
import numpy as np


def name_hash(name: str) -> int:
  """CRC-32 of a name: the same on every machine and Python version, unlike `hash`."""
  return zlib.crc32(name.encode())


def fold(key: jax.Array, *names) -> jax.Array:
  """Folds strings and integers (traced ones too) into a typed key, in order."""
  for name in names:
    key = jax.random.fold_in(key, name_hash(name) if isinstance(name, str) else name)
  return key


def host_rng(seed: int, *names) -> np.random.Generator:
  """NumPy generator at the address (seed, *names); names are strings or integers."""
  words = [name_hash(n) if isinstance(n, str) else int(n) % 2**32 for n in names]
  return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *words])))
