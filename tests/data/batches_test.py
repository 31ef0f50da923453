import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo_jax.data import batches
from zppo_jax.data.tasks import sources
from zppo_jax.data.tokenizer import CharTokenizer

BUCKETS = (4, 8, 16)


def rows_of(count=23, longest=16):
  lengths = [1 + (7 * i) % longest for i in range(count)]
  return [(np.arange(n) + 100 * i, np.arange(n) >= n // 2) for i, n in enumerate(lengths)]


def sft(rows=None, **kwargs):
  options = {'batch_size': 4, 'buckets': BUCKETS, 'pad_id': 0, 'seed': 3} | kwargs
  return batches.sft_stream(rows_of() if rows is None else rows, **options)


def take(stream, count):
  return [next(stream) for _ in range(count)]


def test_every_epoch_holds_every_row_once():
  stream = batches.prompt_stream(range(10), batch_size=4, seed=1)
  ids = np.concatenate(take(stream, 15))
  assert ids.dtype == np.int32
  epochs = ids.reshape(6, 10)
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) > 1
  assert stream.epoch == 6.0


def test_prompt_order_follows_the_seed():
  def first(seed):
    return tuple(next(batches.prompt_stream(range(100), batch_size=50, seed=seed)))

  assert first(0) == first(0) != first(1)


@pytest.mark.parametrize('make', [
  lambda **kw: batches.prompt_stream(range(10), **({'batch_size': 4, 'seed': 5} | kw)),
  sft,
])  # fmt: skip
def test_resume_equals_no_resume_at_every_step(make):
  straight = [repr(batch) for batch in take(make(), 14)]
  for stop in range(14):
    stream = make()
    take(stream, stop)
    state = json.loads(json.dumps(stream.get_state()))
    for resumed in (make(), stream):
      resumed.set_state(state)
      assert [repr(batch) for batch in take(resumed, 14 - stop)] == straight[stop:]


@pytest.mark.parametrize('count', [1, 2, 4])
def test_hosts_see_the_same_global_batch(count):
  def stream(i, n):
    return batches.prompt_stream(range(10), batch_size=8, seed=2, shard_index=i, shard_count=n)

  whole = take(stream(0, 1), 9)
  shards = [take(stream(i, count), 9) for i in range(count)]
  for step in range(9):
    parts = np.stack([shard[step] for shard in shards], axis=1)
    np.testing.assert_array_equal(parts.ravel(), whole[step])


def test_a_state_resumes_on_another_number_of_hosts():
  one = batches.prompt_stream(range(10), batch_size=8, seed=2)
  take(one, 3)
  expected = next(one)
  two = [
    batches.prompt_stream(range(10), batch_size=8, seed=2, shard_index=i, shard_count=2)
    for i in range(2)
  ]
  for stream in two:
    stream.set_state(one.get_state() | {'step': 3})
  np.testing.assert_array_equal(np.stack([next(s) for s in two], axis=1).ravel(), expected)


@pytest.mark.parametrize('count', [2, 4])
def test_sft_hosts_agree_on_shape_and_cover(count):
  whole = take(sft(), 12)
  shards = [take(sft(shard_index=i, shard_count=count), 12) for i in range(count)]
  for step in range(12):
    tokens = np.stack([shard[step]['tokens'] for shard in shards], axis=1)
    np.testing.assert_array_equal(tokens.reshape(4, -1), whole[step]['tokens'])


def test_sft_batches_hold_whole_rows_of_one_bucket():
  rows = rows_of()
  for batch in take(sft(), 12):
    assert batch['tokens'].shape[1] in BUCKETS and batch['tokens'].dtype == np.int32
    for i, row in enumerate(batch['row']):
      tokens, loss = rows[row]
      assert batches.bucket_for(len(tokens), BUCKETS) == batch['tokens'].shape[1]
      np.testing.assert_array_equal(batch['tokens'][i][batch['mask'][i]], tokens)
      np.testing.assert_array_equal(batch['loss_mask'][i, : len(tokens)], loss)
      assert not batch['loss_mask'][i, len(tokens) :].any()


def test_sft_loses_no_row():
  stream = sft()
  emitted = Counter(int(i) for batch in take(stream, 40) for i in batch['row'])
  state = stream.get_state()
  emitted.update(i for rows in state['waiting'].values() for i in rows)
  epochs, rest = divmod(state['position'], 23)
  assert sum(emitted.values()) == state['position']
  assert all(emitted[i] in (epochs, epochs + bool(rest)) for i in range(23))


def test_sft_long_rows():
  rows = rows_of(longest=20)
  with pytest.raises(ValueError, match='row .*: length 1[79] exceeds|length (18|20) exceeds'):
    take(sft(rows), 30)
  stream = sft(rows, on_long='drop')
  take(stream, 10)
  assert stream.dropped == stream.get_state()['dropped'] > 0
  with pytest.raises(ValueError, match='no row of 3 fits'):
    next(sft([(np.zeros(50), np.zeros(50))] * 3, on_long='drop'))


def test_rendered_rows_feed_the_stream():
  tokenizer = CharTokenizer(pieces=('\\boxed{',))
  source = sources.build_source({'name': 'arithmetic', 'size': 50})
  rows = batches.render_rows(source, tokenizer, 'plain')
  stream = batches.sft_stream(rows, batch_size=8, buckets=(32, 64), pad_id=tokenizer.pad_id)
  batch = next(stream)
  for i, row in enumerate(batch['row']):
    example = source[int(row)]
    loss = batch['tokens'][i][batch['loss_mask'][i]]
    assert tokenizer.decode(loss) == example.solution and loss[-1] == tokenizer.eos_id


@pytest.mark.parametrize('count', [1, 2])
def test_eval_batches_pad_with_invalid_rows(count):
  steps = [
    list(batches.eval_batches(range(10), batch_size=4, shard_index=i, shard_count=count))
    for i in range(count)
  ]
  assert {len(s) for s in steps} == {3}
  seen = [int(r) for s in steps for rows, valid in s for r in rows[valid]]
  assert sorted(seen) == list(range(10))
  assert sum(len(rows) for s in steps for rows, _ in s) == 12


@given(st.integers(0, 40), st.sets(st.integers(1, 30), min_size=1))
def test_bucket_is_the_smallest_that_fits(length, buckets):
  if length > max(buckets):
    with pytest.raises(ValueError, match=f'length {length} .* {max(buckets)}'):
      batches.bucket_for(length, buckets)
  else:
    bucket = batches.bucket_for(length, buckets)
    assert bucket in buckets and length <= bucket
    assert not any(length <= b < bucket for b in buckets)


def test_pad_rows():
  tokens, mask = batches.pad_rows([[1, 2], [], [3, 4, 5]], 3, 9)
  assert tokens.tolist() == [[1, 2, 9], [9, 9, 9], [3, 4, 5]] and tokens.dtype == np.int32
  assert mask.sum(1).tolist() == [2, 0, 3]
  tokens, mask = batches.pad_rows([[1, 2]], 3, 9, left=True)
  assert tokens.tolist() == [[9, 1, 2]] and mask.tolist() == [[False, True, True]]
  with pytest.raises(ValueError, match='row 1 has 4 tokens.*3'):
    batches.pad_rows([[1], [1, 2, 3, 4]], 3, 0)


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: batches.prompt_stream(range(5), batch_size=3, shard_count=2), 'batch_size 3'),
    (lambda: batches.prompt_stream(range(5), batch_size=0), 'batch_size 0'),
    (lambda: batches.prompt_stream([], batch_size=1), 'empty'),
    (lambda: batches.prompt_stream(range(5), batch_size=2, shard_index=2, shard_count=2), 'shard'),
    (lambda: sft(buckets=(8, 4)), 'strictly increasing'),
    (lambda: sft(buckets=()), 'strictly increasing'),
    (lambda: sft(on_long='cut'), "'cut'"),
    (lambda: sft(batch_size=3, shard_count=2), 'multiple of 2'),
    (lambda: sft().set_state(sft(seed=4).get_state()), 'another stream.*seed'),
    (lambda: sft().set_state(sft(rows_of(5)).get_state()), 'another stream.*size'),
  ],
)
def test_bad_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()
