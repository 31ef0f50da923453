"""Attention over a table of blocks: values, gradients, its router, and the compiled TPU kernels."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention
from kernels import tls_attention as tls
from kernels.tls_attention import block_chunked, block_pallas_tpu, block_reference

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
TIME = 8192  # of the programs compiled for TPU


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


def naive_route(query, key, ids, block, top, tile):
  """MoBA's router for one row and head as it is written: [(table, {block: score})] per tile."""
  found, time = [], len(query)
  for start in range(0, time, tile):
    first, own = start // block, max(tile // block, 1)
    rows = [t for t in range(start, min(start + tile, time)) if ids[t]]
    rows = [t for t in rows if ids[t] == ids[rows[0]]]
    scores = {}
    for j in range(first):
      last = [s for s in range(j * block, (j + 1) * block) if ids[s]]
      last = [s for s in last if ids[s] == ids[last[-1]]]
      if rows and last and ids[last[0]] == ids[rows[0]]:
        scores[j] = np.mean([query[t] @ key[last].mean(0) for t in rows])
    order = sorted(scores, key=lambda j: (-scores[j], j))[:top - own]
    none = -(-time // block)
    listed = [*(min(first + i, none) for i in range(own)), *order]
    found.append((listed + [none] * (top - len(listed)), scores))
  return found


@pytest.mark.parametrize('tile', [1, 8, 32])
def test_route_is_the_written_router(tile):
  """Ties included: the first two blocks hold the same keys."""
  query, key, _, _ = arrays_of(3, 2, 90, 4, 2, 8)
  key = key.at[:, 8:16].set(key[:, :8])
  ids = np.ones((2, 90), np.int32)
  ids[1] = [0] * 3 + [1] * 40 + [2] * 30 + [0] + [2] * 11 + [0] * 5
  table, scores = map(np.asarray, tls.route(
    query, tls.block_means(key, jnp.asarray(ids), block=8), block=8, top=6, query_tile=tile,
    segment_ids=jnp.asarray(ids)))
  for b in range(2):
    for h in range(4):
      wanted = naive_route(np.asarray(query[b, :, h], np.float64),
                           np.asarray(key[b, :, h // 2], np.float64), ids[b], 8, 6, tile)
      assert table[b, h].tolist() == [t for t, _ in wanted]
      for row, (_, known) in zip(scores[b, h], wanted):
        np.testing.assert_allclose(row[list(known)], list(known.values()), atol=1e-5)
        assert np.isneginf(np.delete(row, list(known))).all()


def test_route_by_the_maximum_and_by_key_head():
  query, key, _, _ = arrays_of(4, 1, 64, 4, 2, 8)
  means = tls.block_means(key, block=16)
  _, each = tls.route(query, means, block=16, top=4, query_tile=1)
  each = np.asarray(each).reshape(1, 4, 8, 8, 4)
  _, most = tls.route(query, means, block=16, top=4, query_tile=8, reduce='max')
  np.testing.assert_allclose(most, each.max(3), atol=1e-5)
  _, shared = tls.route(query, means, block=16, top=4, query_tile=8, per_key_head=True)
  np.testing.assert_allclose(shared, each.mean(3).reshape(1, 2, 2, 8, 4).mean(2), atol=1e-5)


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
  means = tls.block_means(key, block=8)
  for changes, part in (
      (dict(top=0), 'top must be at least 1'),
      (dict(query_tile=16, top=1), 'top must be at least 2'),
      (dict(means=means[:, :2]), 'means (2, 2, 2, 8), expected (2, 3, HK, 8)'),
      (dict(reduce='sum'), "reduce must be 'mean' or 'max', got 'sum'"),
      (dict(query=query[0]), 'must be [batch, time, heads, size]')):
    with pytest.raises(ValueError) as error:
      tls.route(**(dict(query=query, means=means, top=2) | good | changes))
    assert part in str(error.value), (part, str(error.value))


def compile_for(topology, sizes):
  """Bytes of temporaries and of arrays of forward and backward, compiled for a TPU."""
  from jax.experimental import topologies
  time, heads, kv, width, value, own, block, entries, dtype = sizes
  device = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[0]
  mesh = jax.sharding.Mesh([device], ('x',))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  struct = lambda shape, kind=dtype: jax.ShapeDtypeStruct(shape, kind, sharding=place)

  def run(arrays, d_out, table, budget, ids):
    def rule(*arrays):
      return tls.block_attention(*arrays, table, block=block, budget=budget, segment_ids=ids,
                                 implementation='pallas_tpu')
    out, back = jax.vjp(rule, *arrays)
    return out, back(d_out)

  arrays = [struct((1, time, h, n)) for h, n in ((heads, width), (kv, width), (kv, value))]
  facts = (struct((1, own, time // 128, entries), jnp.int32), struct((1,), jnp.int32),
           struct((1, time), jnp.int32))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jax.jit(run).lower(arrays, struct((1, time, heads, value)), *facts)
  assert lowered.as_text().count('@tpu_custom_call') == 3
  stats = lowered.compile().memory_analysis()
  return stats.temp_size_in_bytes, stats.argument_size_in_bytes + stats.output_size_in_bytes


def compiled(cases):
  pytest.importorskip('libtpu')
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | {
    'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'PYTHONPATH': str(pathlib.Path(__file__).resolve().parents[3])}
  done = subprocess.run([sys.executable, __file__, json.dumps(cases)], env=env, check=False,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout)


@pytest.mark.aot
def test_kernels_compile_for_tpu():
  """No array of the size of the scores, or of T * M * block keys: only copies of the arguments."""
  sizes = TIME, 2, 1, 128, 128, 1, 256, 7, 'bfloat16'
  for temporary, arrays in compiled([['v5e:2x2', sizes], ['v6e:2x2', sizes]]):
    assert temporary <= arrays < 32 << 20


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
def test_kernels_compile_at_full_size(topology):
  found = compiled([[topology, sizes] for sizes in (
    (32768, 32, 8, 128, 128, 8, 256, 32, 'bfloat16'),
    (32768, 32, 8, 128, 128, 32, 256, 32, 'bfloat16'),  # a table per query head: several calls
    (TIME, 8, 2, 128, 128, 2, 256, 32, 'float32'), (TIME, 8, 2, 64, 64, 2, 64, 16, 'bfloat16'),
    (TIME, 16, 1, 576, 512, 1, 256, 32, 'bfloat16'))])
  for temporary, arrays in found:
    assert temporary <= 2 * arrays


if __name__ == '__main__':
  print(json.dumps([compile_for(*case) for case in json.loads(sys.argv[1])]))
