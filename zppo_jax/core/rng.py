"""Named key folding: every random number has an address, never a place in a sequence."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np


def name_hash(name: str) -> int:
  """CRC-32 of a name: the same on every machine and Python version, unlike `hash`."""
  return zlib.crc32(name.encode())


def fold(key: jax.Array, *names) -> jax.Array:
  """Folds strings and integers (traced ones too) into a typed key, in order."""
  for name in names:
    key = jax.random.fold_in(key, name_hash(name) if isinstance(name, str) else name)
  return key


def fold_each(keys: jax.Array, *names: jax.Array) -> jax.Array:
  """keys[i] = fold(keys[i], *(n[i] for n in names)): a key or keys, and arrays of integers.

  All are broadcast to one shape. The folds are a loop, so that they are compiled once.
  """
  shape = jnp.broadcast_shapes(keys.shape, *(n.shape for n in names))
  each = lambda x: jnp.broadcast_to(x, shape).reshape(-1)
  names = jnp.stack([each(n).astype(jnp.uint32) for n in names])
  fold_in = jax.vmap(jax.random.fold_in)
  found, _ = jax.lax.scan(lambda keys, n: (fold_in(keys, n), None), each(keys), names)
  return found.reshape(shape)


def host_rng(seed: int, *names) -> np.random.Generator:
  """NumPy generator at the address (seed, *names); names are strings or integers."""
  words = [name_hash(n) if isinstance(n, str) else int(n) % 2**32 for n in names]
  return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *words])))
