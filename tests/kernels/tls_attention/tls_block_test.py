"""Attention over a table of blocks: values and gradients of every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention
from kernels import tls_attention as tls
from kernels.tls_attention import (
  block_chunked,
  block_lists,
  block_pallas_tpu,
  block_reference,
)

COSTLY = {'test_chunked_is_the_reference': ('exact sets', 'grouped, odd time'),
          'test_pallas_is_the_reference': ('a table per query head', 'grouped, odd time')}
RULES = {'chunked': block_chunked.block_attention,
         'pallas_tpu': functools.partial(block_pallas_tpu.block_attention, interpret=True)}
CASES = {  # batch, time, HQ, HK, K, V, table heads, block, tile, entries, packed
  'grouped, odd time': (2, 75, 4, 2, 16, 16, 2, 8, 16, 4, True),
  'a table per query head': (1, 64, 4, 2, 16, 24, 4, 16, 8, 3, True),
  'latent sizes': (1, 61, 4, 1, 40, 16, 1, 8, 8, 5, False),
  'one head each': (2, 40, 2, 2, 16, 16, 2, 8, 32, 2, True),
  'wide': (1, 80, 2, 1, 32, 32, 1, 16, 16, 3, True),
  'exact sets': (2, 37, 4, 2, 16, 16, 4, 8, 1, 4, True),
}
TILED = [c for c in CASES if CASES[c][8] % 8 == 0]


def make(case, dtype=np.float32):
  """Arrays, table with repeats and entries that cannot count, segments, weight of the output."""
  batch, time, heads, kv, key, value, own, block, tile, entries, packed = CASES[case]
  rng = np.random.default_rng(len(case))
  arrays = [rng.normal(size=(batch, time, h, k)) for h, k in (
    (heads, key), (kv, key), (kv, value))]
  blocks, tiles = -(-time // block), -(-time // tile)
  table = rng.integers(0, blocks + 1, (batch, own, tiles, entries))
  table[..., -1] = table[..., 0]
  ids = np.ones((batch, time), np.int32)
  if packed:  # padding, three segments, the second with a gap, padding
    ids = 1 + np.searchsorted([time // 4, time // 2], np.arange(time), side='right')
    ids[[*range(3), time // 3, *range(time - 4, time)]] = 0
    ids = np.stack([np.roll(ids, 5 * b) for b in range(batch)])
  weight = rng.normal(size=(batch, time, heads, value))
  budget = rng.integers(1, entries + 1, batch)
  return [jnp.asarray(a, dtype) for a in arrays], jnp.asarray(weight, dtype), dict(
    table=jnp.asarray(table, jnp.int32), block=block, query_tile=tile,
    budget=jnp.asarray(budget, jnp.int32), segment_ids=jnp.asarray(ids, jnp.int32),
    scale=key**-0.5)


def evaluate(rule, arrays, weight, static):
  """[out, d_query, d_key, d_value] in float64."""
  sizes = {k: static[k] for k in ('block', 'query_tile', 'scale') if k in static}
  traced = {k: v for k, v in static.items() if k not in sizes}
  @jax.jit
  def run(arrays, traced):
    def loss(arrays):
      out = rule(*arrays, **traced, **sizes)
      return jnp.sum((out * weight).astype(jnp.promote_types(out.dtype, jnp.float32))), out
    return jax.value_and_grad(loss, has_aux=True)(arrays)

  (_, out), grads = run(arrays, traced)
  return [np.asarray(x, np.float64) for x in (out, *grads)]


@functools.cache
def law(case):
  with jax.enable_x64(True):
    return evaluate(block_reference.block_attention, *make(case, np.float64))


def worst(found, wanted):
  assert all(np.isfinite(x).all() for x in found)
  return max(np.sqrt(np.mean((a - b)**2) / max(np.mean(b**2), 1e-30))
             for a, b in zip(found, wanted))


@pytest.mark.parametrize('case', CASES)
def test_chunked_is_the_reference(case):
  assert worst(evaluate(RULES['chunked'], *make(case)), law(case)) < 1e-5


@pytest.mark.parametrize('case', TILED)
def test_pallas_is_the_reference(case):
  assert worst(evaluate(RULES['pallas_tpu'], *make(case)), law(case)) < 1e-5


def test_pallas_with_tables_and_lists_in_parts(monkeypatch):
  """Query heads of one table in two lists, and too many scalars for one call."""
  case = 'latent sizes'
  monkeypatch.setattr(block_pallas_tpu, 'MOST_ROWS', 16)
  monkeypatch.setattr(block_pallas_tpu, 'TABLE_BYTES', 4 * 2 * 8 * 6)
  assert worst(evaluate(RULES['pallas_tpu'], *make(case)), law(case)) < 1e-5
  monkeypatch.setattr(block_pallas_tpu, 'TABLE_BYTES', 4 * 2 * 8 * 6 - 1)
  with pytest.raises(NotImplementedError, match='96 table entries for a key head, at most 95'):
    evaluate(RULES['pallas_tpu'], *make(case))


def test_where_pallas_cannot_run_it_says_why():
  (query, key, value), _, static = make('exact sets')
  with pytest.raises(NotImplementedError, match='query_tile=1: a multiple of 8 is needed'):
    RULES['pallas_tpu'](query, key, value, **static)
  with pytest.raises(NotImplementedError, match='pallas_tpu: a TPU is needed, the platform is cpu'):
    tls.block_attention(query, key, value, **static, implementation='pallas_tpu')


@pytest.mark.parametrize('name', RULES)
def test_no_product_of_float32_is_rounded(name):
  """A TPU would take bfloat16 operands by default, which no run on a CPU shows."""
  arrays, weight, static = make('wide')
  sizes = {k: static.pop(k) for k in ('block', 'query_tile', 'scale')}

  def run(*arrays):
    return jax.vjp(lambda *a: RULES[name](*a, **static, **sizes), *arrays)[1](weight)

  def route(query, key, _):
    return tls.route(query, tls.block_means(key, block=16), block=16, top=3, query_tile=16)

  for rule in (run, route):
    text = str(jax.make_jaxpr(rule)(*arrays))
    exact = text.count('precision=(Precision.HIGHEST, Precision.HIGHEST)')
    assert text.count(' dot_general[') == exact > 0


def test_walks_visit_what_counts_and_fetch_nothing_else():
  (query, key, _), _, static = make('grouped, odd time')
  plan = block_lists.make_plan(query, key, static['table'], block=8, tile=16, scale=1.0)
  entries = block_lists.lay_entries(plan, static['table'], static['budget'])
  steps = np.asarray(block_pallas_tpu.by_tile(plan, entries)).reshape(-1, plan.entries)
  live, block = steps >= 0, np.where(steps < 0, -1 - steps, steps)
  assert 0 < live.sum() < live.size and live[:, :plan.own].all()
  assert (live | (block == np.roll(block, 1, axis=1))).all()  # no new block, hence no copy
  pairs = {(row // plan.tiles, b, row % plan.tiles)
           for row, (bs, ls) in enumerate(zip(block, live)) for b in bs[ls]}
  assert len(pairs) == live.sum()
  steps = np.asarray(block_pallas_tpu.by_block(plan, entries))
  live, step = steps >= 0, np.where(steps < 0, -1 - steps, steps)
  bits = block_pallas_tpu.item_bits(plan)
  assert pairs == {(row, s >> bits, s & ((1 << bits) - 1)) for row, s in zip(*(
    np.nonzero(live)[0], step[live]))}
  assert (np.diff(step) >= 0).all()  # a block is left once, after all its steps
  assert all(set(row >> bits) == set(range(plan.blocks)) for row in step)


def test_chunked_turns_fall_with_the_budget_and_memory_is_linear():
  def case(time):
    arrays = [jnp.zeros((1, time, h, 16)) for h in (2, 1, 1)]
    return arrays, jnp.broadcast_to(jnp.arange(16), (1, 1, time // 16, 16))

  def turns(budget):
    arrays, table = case(2048)
    plan = block_lists.make_plan(*arrays[:2], table, block=16, tile=16, scale=1.0)
    return np.sum(block_chunked._work(
      plan, 16, block_lists.lay_entries(plan, table, jnp.asarray([budget])),
      block_lists.lay_facts(plan, jnp.ones((1, 2048), jnp.int32)))[3])

  def memory(time):
    arrays, table = case(time)
    run = gradients(tls.block_attention, block=16, query_tile=16, implementation='chunked')
    return run.lower(arrays, arrays[0], table=table).compile().memory_analysis().temp_size_in_bytes

  # A step is 8 tiles, a turn 3 entries of 1 + budget; the first two steps see 8 and 16 blocks.
  assert [turns(n) for n in (1, 8, 16)] == [16, 16 * 3, 3 + 6 + 14 * 6]
  assert memory(8192) < 4.4 * memory(2048)


def arrays_of(seed, batch, time, heads, kv, width, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=(batch, time, h, width)), dtype)
          for h in (heads, kv, kv, heads)]


@functools.cache
def gradients(rule, **static):
  """(arrays, weight) -> [out, d_query, d_key, d_value] of a rule with static arguments."""
  def run(arrays, weight, **traced):
    out, back = jax.vjp(lambda *x: rule(*x, **traced, **static), *arrays)
    return [out, *back(weight)]
  return jax.jit(run)


def moba(query, key, value, budget=None, segment_ids=None, *, block, top, query_tile,
         per_key_head=False):
  means = tls.block_means(key, segment_ids, block=block)
  table, _ = tls.route(query, means, block=block, top=top, query_tile=query_tile,
                       segment_ids=segment_ids, per_key_head=per_key_head)
  return tls.block_attention(query, key, value, table, block=block, query_tile=query_tile,
                             budget=budget, segment_ids=segment_ids)


def test_a_budget_of_all_blocks_is_dense_attention_and_one_is_the_own_block():
  """One program: the budget is traced, and a static one gives the same."""
  *arrays, weight = arrays_of(0, 2, 60, 4, 2, 16)
  run = gradients(moba, block=8, top=8, query_tile=8)
  dense = gradients(attention.attention, implementation='reference')(arrays, weight)
  for found, wanted in zip(run(arrays, weight, budget=jnp.int32(8)), dense):
    np.testing.assert_allclose(found, wanted, atol=1e-5)
  ids = jnp.broadcast_to(jnp.arange(60) // 8, (2, 60))
  local = gradients(attention.attention, implementation='reference')(
    arrays, weight, segment_ids=ids)
  for found, wanted in zip(run(arrays, weight, budget=jnp.asarray([1, 1])), local):
    np.testing.assert_allclose(found, wanted, atol=1e-5)
  static = gradients(moba, block=8, top=8, query_tile=8, budget=3)(arrays, weight)
  for found, wanted in zip(run(arrays, weight, budget=jnp.int32(3)), static):
    np.testing.assert_array_equal(found, wanted)
  both = run(arrays, weight, budget=jnp.asarray([1, 3]))
  np.testing.assert_array_equal(both[0][1], static[0][1])
  np.testing.assert_allclose(both[0][0], local[0][0], atol=1e-5)


def test_finite_differences():
  case = 'grouped, odd time'
  with jax.enable_x64(True):
    arrays, weight, static = make(case, np.float64)
    sizes = {k: static.pop(k) for k in ('block', 'query_tile', 'scale')}
    run = jax.jit(lambda a: jnp.sum(weight * block_chunked.block_attention(*a, **static, **sizes)))
    grads = jax.grad(run)(arrays)
    rng = np.random.default_rng(0)
    for i, grad in enumerate(grads):
      way = rng.normal(size=grad.shape)
      high, low = (run([x + e * way if j == i else x for j, x in enumerate(arrays)])
                   for e in (1e-5, -1e-5))
      np.testing.assert_allclose((high - low) / 2e-5, np.sum(grad * way), rtol=1e-7)


@pytest.mark.parametrize('name', RULES)
def test_bfloat16(name):
  case = 'wide'
  assert worst(evaluate(RULES[name], *make(case, jnp.bfloat16)), law(case)) < 2e-2


def test_padding_is_never_read_and_gets_no_gradient():
  (query, key, value), weight, static = make('grouped, odd time')
  static.pop('scale')
  pad = np.asarray(static['segment_ids'] == 0)[..., None, None]
  bad = [jnp.where(pad, jnp.nan, x) for x in (query, key, value)]
  found = evaluate(tls.block_attention, bad, weight, static)
  for x, wanted in zip(found, evaluate(tls.block_attention, (query, key, value), weight, static)):
    np.testing.assert_array_equal(x, wanted)
    assert (x[np.broadcast_to(pad, x.shape)] == 0).all()


def test_every_argument_that_does_not_fit_is_named():
  query, key, value, _ = arrays_of(0, 2, 20, 4, 2, 8)
  table = jnp.zeros((2, 2, 3, 2), jnp.int32)
  good = dict(block=8, query_tile=8)
  call = functools.partial(tls.block_attention, query, key, value, table, **good)
  jax.eval_shape(call)
  with pytest.raises(ValueError, match='budget must be at least 1, got 0'):
    jax.jit(functools.partial(call, budget=jnp.int32(0)))()
  for changes, part in (
      (dict(block=12), 'block must be a multiple of 8, got 12'),
      (dict(query_tile=3), 'query_tile must divide block = 8 or be a multiple of it, got 3'),
      (dict(query_tile=0), 'query_tile must divide block = 8 or be a multiple of it, got 0'),
      (dict(budget=0), 'budget must be at least 1, got 0'),
      (dict(budget=jnp.asarray([1, 0])), 'budget must be at least 1, got 0'),
      (dict(budget=jnp.zeros(3, jnp.int32)), 'budget int32(3,), expected int32() or int32(2,)'),
      (dict(budget=1.5), 'budget float64(), expected int32()'),
      (dict(segment_ids=jnp.zeros((2, 4), jnp.int32)), 'segment_ids int32(2, 4), expected int32(2'),
      (dict(table=table[:, :, :2]), 'table int32(2, 2, 2, 2), expected int32(2, HQ = 4 or HK = 2'),
      (dict(table=table[:, :1]), 'table int32(2, 1, 3, 2)'),
      (dict(table=table.astype(jnp.float32)), 'table float32(2, 2, 3, 2)'),
      (dict(table=table[..., :0]), 'M at least 1'),
      (dict(key=key[:, :, :1].repeat(3, 2)), 'key (2, 20, 3, 8), expected (2, 20, HK, 8)'),
      (dict(value=value[:, :4]), 'value (2, 4, 2, 8), expected (2, 20, 2) as key'),
      (dict(value=value.astype(jnp.bfloat16)), 'value bfloat16, expected float32 as query'),
      (dict(query=query[0]), 'must be [batch, time, heads, size]'),
      (dict(implementation='fast'), 'expected of')):
    given = dict(query=query, key=key, value=value, table=table) | good | changes
    with pytest.raises(ValueError) as error:
      tls.block_attention(**given)
    assert part in str(error.value), (part, str(error.value))
