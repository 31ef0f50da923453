"""Models here are small: compiling them is the cost of these tests."""

import jax
import pytest


@pytest.fixture(scope='module', autouse=True)
def quick_compiles():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
