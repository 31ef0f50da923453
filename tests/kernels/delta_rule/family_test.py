"""Each published rule is a choice of inputs; decoding is the same rule token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import delta_rule as lib
from kernels.delta_rule import api, shapes

CASE = shapes.Case(70, heads=2, key_heads=2, key=8, value=8, batch=2)
BOUND = 1e-5


@pytest.fixture(scope='module')
def given():
  rng = np.random.default_rng(0)
  shape = CASE.batch, CASE.time, CASE.heads

  def draw(*size):
    return jnp.asarray(rng.normal(size=(*shape, *size)), jnp.float32)

  key = draw(8)
  return dict(q=draw(8), key=key / jnp.linalg.norm(key, axis=-1, keepdims=True), value=draw(8),
              rate=jax.nn.sigmoid(draw()), rates=jax.nn.sigmoid(draw(8)),
              value_rates=jax.nn.sigmoid(draw(8)), decay=-jnp.exp(draw(8) - 2),
              head_decay=-jnp.exp(draw(1) - 2))


def run(given, inputs, decay, implementation='chunked'):
  return api.delta_rule(given['q'], *inputs, decay, implementation=implementation)


def assert_same(found, wanted):
  for a, b in zip(found, wanted):
    np.testing.assert_allclose(a, b, rtol=0, atol=BOUND)


def wide(x, like):
  return jnp.broadcast_to(x[..., None], like.shape)


@pytest.mark.parametrize('implementation', ('reference', 'chunked'))
def test_constant_rates_are_kda(given, implementation):
  g = given
  kda = run(g, lib.kda_inputs(g['key'], g['value'], g['rate']), g['decay'], implementation)
  rates = wide(g['rate'], g['key'])
  assert_same(run(g, lib.fg2_inputs(g['key'], g['value'], rates), g['decay'], implementation), kda)
  assert_same(run(g, lib.fg2_plus_inputs(g['key'], g['value'], rates, rates), g['decay'],
                  implementation), kda)


def test_constant_decay_is_gdn_and_none_is_delta_net(given):
  g = given
  inputs = lib.gdn_inputs(g['key'], g['value'], g['rate'])
  everywhere = jnp.broadcast_to(g['head_decay'], g['decay'].shape)
  assert_same(run(g, inputs, everywhere), run(g, inputs, g['head_decay']))
  plain = run(g, lib.delta_net_inputs(g['key'], g['value'], g['rate']), 0 * g['decay'])
  assert_same(run(g, inputs, 0 * g['head_decay']), plain)


def test_gdn2_with_one_rate_is_kda(given):
  g = given
  gates = wide(g['rate'], g['key']), wide(g['rate'], g['value'])
  assert_same(run(g, lib.gdn2_inputs(g['key'], g['value'], *gates), g['decay']),
              run(g, lib.kda_inputs(g['key'], g['value'], g['rate']), g['decay']))


def test_gated_linear_attention_is_the_written_sum(given):
  g = given
  out, _ = run(g, lib.gla_inputs(g['key'], g['value']), g['head_decay'])
  total = jnp.cumsum(g['head_decay'][..., 0], 1)
  decay = jnp.exp(total[:, :, None] - total[:, None]) * jnp.tril(jnp.ones((70, 70)))[..., None]
  scores = jnp.einsum('bthk,bshk->btsh', g['q'], g['key']) * decay * 8**-0.5
  assert_same([out], [jnp.einsum('btsh,bshv->bthv', scores, g['value'])])


def test_vanishing_rates_leave_pure_decay(given):
  g = given
  state = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 8, 8)), jnp.float32)
  none = jnp.zeros_like(g['rates'])
  _, after = api.delta_rule(g['q'], *lib.fg2_plus_inputs(g['key'], g['value'], none, none),
                            g['decay'], state=state)
  np.testing.assert_allclose(after, jnp.exp(g['decay'].sum(1))[..., None] * state, atol=1e-4)


def test_erasing_alone_clears_what_the_key_holds(given):
  """Rate 1 on the key side and 0 on the value side: S'^T k = 0, and the rest stays."""
  g = given
  key, state = g['key'][:, 0], jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 8, 8)),
                                           jnp.float32)
  ones, few = jnp.ones_like(key), jnp.zeros_like(key)
  write, erase, value = (x[:, 0] for x in lib.fg2_plus_inputs(
    key[:, None], g['value'][:, :1], ones[:, None], few[:, None]))
  after, _ = lib.step(state, g['q'][:, 0], write, erase, value, jnp.zeros((2, 2, 1)))
  left = jnp.einsum('bhkv,bhk->bhv', after, key)
  size = float(jnp.abs(g['value'][:, 0]).max()) * 1e-3  # the smallest rate is not 0: sqrt(1e-6)
  assert float(jnp.abs(left).max()) < size
  other = jnp.roll(key, 1, -1) - jnp.sum(jnp.roll(key, 1, -1) * key, -1, keepdims=True) * key
  np.testing.assert_allclose(jnp.einsum('bhkv,bhk->bhv', after, other),
                             jnp.einsum('bhkv,bhk->bhv', state, other), atol=1e-5)


def test_steps_equal_the_parallel_form(given):
  g = given
  inputs = lib.fg2_plus_inputs(g['key'], g['value'], g['rates'], g['value_rates'])
  out, after = run(g, inputs, g['decay'])
  state, outs = jnp.zeros((2, 2, 8, 8)), []
  for t in range(CASE.time):
    state, o = lib.step(state, g['q'][:, t], *(x[:, t] for x in inputs), g['decay'][:, t])
    outs.append(o)
  assert_same([jnp.stack(outs, 1), state], [out, after])


@pytest.mark.parametrize('border', (1, 31, 63, 64, 69))
def test_a_split_anywhere_gives_the_same_state(given, border):
  g = given
  inputs = lib.kda_inputs(g['key'], g['value'], g['rate'])
  arguments = g['q'], *inputs, g['decay']
  first, state = api.delta_rule(*(x[:, :border] for x in arguments))
  second, after = api.delta_rule(*(x[:, border:] for x in arguments), state=state)
  assert_same([jnp.concatenate([first, second], 1), after], run(g, inputs, g['decay']))


def test_the_state_never_grows_without_values(given):
  g = given
  state, norms = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 8, 8)), jnp.float32), []
  write, erase, value = lib.fg2_plus_inputs(g['key'], 0 * g['value'], g['rates'], g['value_rates'])
  for t in range(CASE.time):
    state, _ = lib.step(state, g['q'][:, t], write[:, t], erase[:, t], value[:, t],
                        g['decay'][:, t])
    norms.append(float(jnp.linalg.norm(state)))
  assert all(b <= a * (1 + 1e-6) for a, b in zip(norms, norms[1:]))


def test_permuting_key_channels_changes_nothing(given):
  g, order = given, np.random.default_rng(2).permutation(8)
  inputs = lib.kda_inputs(g['key'], g['value'], g['rate'])
  moved = [x[..., order] for x in inputs[:2]]
  out, _ = api.delta_rule(g['q'][..., order], *moved, inputs[2], g['decay'][..., order])
  assert_same([out], [run(g, inputs, g['decay'])[0]])


def test_padding_is_never_read(given):
  g = given
  inputs = lib.kda_inputs(g['key'], g['value'], g['rate'])
  arguments = g['q'], *inputs, g['decay']
  ids = jnp.zeros((2, 70), jnp.int32).at[:, 3:40].set(5).at[:, 45:60].set(2)
  dirty = [jnp.where((ids != 0)[..., None, None], x, jnp.nan) for x in arguments]

  def loss(arguments, ids):
    out, state = api.delta_rule(*arguments, segment_ids=ids)
    return jnp.sum(out**2) + jnp.sum(state**2), (out, state)

  clean_grads, wanted = jax.jit(jax.grad(loss, has_aux=True))(arguments, ids)
  grads, found = jax.jit(jax.grad(loss, has_aux=True))(dirty, ids)
  for a, b in zip((*found, *grads), (*wanted, *clean_grads)):
    np.testing.assert_array_equal(a, b)
  assert not np.any(np.asarray(found[0][:, 40:45]))
