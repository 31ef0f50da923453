"""The router of block-table attention against MoBA's as it is written."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import tls_attention as tls


def arrays_of(seed, batch, time, heads, kv, width, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=(batch, time, h, width)), dtype)
          for h in (heads, kv, kv, heads)]


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
  query, key, _, _ = arrays_of(0, 2, 20, 4, 2, 8)
  good = dict(block=8, query_tile=8)
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
