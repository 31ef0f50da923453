import gzip
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from zppo_jax.data import files, schemas
from zppo_jax.data.tasks import sources

GSM8K = {'question': 'How many?', 'answer': 'Half: 48/2=<<48/2=24>>24\n#### $1,024'}
MATH = {
  'problem': 'Find $x$.', 'level': 'Level 3', 'type': 'Algebra',
  'solution': r'So $\boxed{1}$, or rather \boxed{\frac{1}{2}}.',
}  # fmt: skip
HEAD = (
  'Solve the following math problem step by step. The last line of your response should be of '
  'the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n'
)
TAIL = '\n\nRemember to put your answer on its own line after "Answer:".'
DAPO = {
  'data_source': 'math_dapo',
  'prompt': [{'role': 'user', 'content': f'{HEAD}Compute 3-37.{TAIL}'}],
  'ability': 'MATH',
  'reward_model': {'ground_truth': '-34', 'style': 'rule-lighteval/MATH_v2'},
  'extra_info': {'index': 'a'},
}
PLAIN = {'prompt': 'What is 6*7?', 'answer': 42}


def write(path, rows):
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  path.write_text('\n'.join(lines) + '\n')
  return path


def plain_rows(count):
  return [{'question': f'what is {i}+1?', 'answer': str(i + 1)} for i in range(count)]


@pytest.mark.parametrize(
  'name, row, answer, verifier',
  [
    ('gsm8k', GSM8K, '1024', 'numeric_exact'),
    ('math', MATH, r'\frac{1}{2}', 'math'),
    ('math', MATH | {'answer': '7', 'subject': 'Algebra', 'level': 5}, '7', 'math'),
    ('dapo', DAPO, '-34', 'math'),
    ('plain', PLAIN, '42', 'math'),
  ],
)
def test_schemas_are_detected(tmp_path, name, row, answer, verifier):
  source = files.load_file(write(tmp_path / 'rows.jsonl', [row]))
  assert source.schema == name and len(source) == 1
  example = source[0]
  assert (example.answer, example.verifier) == (answer, verifier)
  assert example.messages[-1].role == 'user'
  explicit = files.load_file(tmp_path / 'rows.jsonl', schema=name)
  assert explicit.examples == source.examples


def test_details_of_each_schema(tmp_path):
  gsm8k = files.load_file(write(tmp_path / 'a.jsonl', [GSM8K]))[0]
  assert gsm8k.solution == 'Half: 48/2=24\n\\boxed{1024}'
  for level, expected in (('Level 3', 3), ('Level ?', None), (5, 5)):
    math = files.load_file(write(tmp_path / 'b.jsonl', [MATH | {'level': level}]))[0]
    assert math.meta['level'] == expected and math.meta['subject'] == 'Algebra'
  path = write(tmp_path / 'c.jsonl', [DAPO])
  assert files.load_file(path)[0].messages[0].content.startswith('Solve')
  bare = files.load_file(path, keep_instruction=False)[0]
  assert bare.messages[0].content == 'Compute 3-37.'


def test_dapo_is_deduplicated_on_content(tmp_path):
  other = DAPO | {'prompt': [{'role': 'user', 'content': 'Compute 1+1.'}]}
  rows = [DAPO | {'extra_info': {'index': str(i)}} for i in range(100)] + [other]
  source = files.load_file(write(tmp_path / 'rows.jsonl', rows))
  assert len(source) == 2 and source.duplicates == 99 and not source.skipped


def test_containers_agree(tmp_path):
  rows = plain_rows(20)
  text = write(tmp_path / 'rows.jsonl', rows).read_text()
  (tmp_path / 'rows.jsonl.gz').write_bytes(gzip.compress(text.encode()))
  (tmp_path / 'rows.json').write_text(json.dumps(rows))
  (tmp_path / 'rows.json.gz').write_bytes(gzip.compress(json.dumps(rows).encode()))
  (tmp_path / 'bom.jsonl').write_text('\ufeff' + text)
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'rows.parquet')
  expected = files.load_file(tmp_path / 'rows.jsonl').examples
  for name in ('rows.jsonl.gz', 'rows.json', 'rows.json.gz', 'rows.parquet', 'bom.jsonl'):
    assert files.load_file(tmp_path / name).examples == expected, name


def test_dapo_from_parquet(tmp_path):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist([DAPO] * 3), tmp_path / 'dapo.parquet')
  source = files.load_file(tmp_path / 'dapo.parquet')
  assert source.schema == 'dapo' and source.duplicates == 2 and source[0].answer == '-34'


BAD_ROWS = [
  ('plain', '{"question": "q", "answer"', 'not JSON'),
  ('plain', '[1, 2]', 'expected an object, found list'),
  ('plain', {'question': 'q'}, "field 'answer' is missing"),
  ('plain', {'question': ' ', 'answer': '1'}, "field 'question' is empty"),
  ('plain', {'question': 'q', 'answer': None}, "'answer' is a NoneType"),
  ('plain', {'question': 'q', 'answer': float('nan')}, "'answer' is NaN"),
  ('plain', {'question': 'q', 'prompt': 'p', 'answer': '1'}, 'exactly one of the fields'),
  ('plain', {'prompt': [], 'answer': '1'}, 'non-empty list'),
  ('plain', {'prompt': [{'role': 'bard', 'content': 'x'}], 'answer': '1'}, 'unknown roles'),
  ('plain', {'prompt': [{'role': 'assistant', 'content': 'x'}], 'answer': '1'}, 'must end'),
  ('gsm8k', {'question': 'q', 'answer': 'x #### about ten'}, "'about ten' is not a number"),
  ('gsm8k', {'question': 'q', 'answer': 'x #### nan'}, 'is not a number'),
  ('gsm8k', {'question': 'q', 'answer': 'ten'}, "no '####'"),
  ('math', {'problem': 'p', 'solution': r'it is \boxed{1'}, 'no complete'),
  ('math', {'problem': 'p', 'solution': r'it is \boxed{}'}, 'is empty'),
  ('dapo', {'prompt': 'p', 'reward_model': 'x'}, "'reward_model' must be an object"),
  ('dapo', {'prompt': 'p', 'reward_model': {}}, "'ground_truth' is missing"),
]


@pytest.mark.parametrize('schema, bad, reason', BAD_ROWS)
def test_bad_rows_name_file_line_and_reason(tmp_path, schema, bad, reason, caplog):
  good = {'gsm8k': GSM8K, 'math': MATH, 'dapo': DAPO, 'plain': PLAIN}[schema]
  path = write(tmp_path / 'rows.jsonl', [good, '', bad])
  for asked in (schema, 'auto'):
    with pytest.raises(files.FileFormatError, match=reason) as error:
      files.load_file(path, asked)
    assert f'{path}:3: ' in str(error.value) and '1 bad rows' in str(error.value)
    assert "on_bad_row='skip'" in str(error.value)
  with caplog.at_level(logging.WARNING):
    source = files.load_file(path, on_bad_row='skip')
  assert len(source) == 1 and [row.line for row in source.skipped] == [3]
  assert 'skipped 1 bad rows' in caplog.text


def test_many_bad_rows_are_counted(tmp_path):
  path = write(tmp_path / 'rows.jsonl', [PLAIN, *['{'] * 9])
  with pytest.raises(files.FileFormatError, match='9 bad rows(.|\n)*and 4 more'):
    files.load_file(path)


def test_repeated_questions_are_bad_rows(tmp_path):
  path = write(tmp_path / 'rows.jsonl', [PLAIN, PLAIN | {'answer': 43}])
  with pytest.raises(files.FileFormatError, match=':2: same question as line 1'):
    files.load_file(path)
  assert files.load_file(path, on_bad_row='skip')[0].answer == '42'


def test_invalid_utf8_is_a_bad_row(tmp_path):
  (tmp_path / 'rows.jsonl').write_bytes(json.dumps(PLAIN).encode() + b'\n\xff\xfe\n')
  with pytest.raises(files.FileFormatError, match=':2: not UTF-8'):
    files.load_file(tmp_path / 'rows.jsonl')


@pytest.mark.parametrize(
  'name, data, message',
  [
    ('a.txt', b'', 'suffix must be one of'),
    ('a.json', b'{"a": 1}', 'expected an array'),
    ('a.json', b'{"a": 1}\n{"a": 2}', 'one object per line is .jsonl'),
    ('a.jsonl.gz', b'plain', 'not a gzip file'),
    ('a.parquet', b'plain', 'not a parquet file'),
    ('a.jsonl', b'{"text": "x"}', "no schema fits, found \\['text'\\](.|\n)*gsm8k"),
    ('a.jsonl', b'', 'no readable row'),
  ],
)
def test_unusable_files(tmp_path, name, data, message):
  (tmp_path / name).write_bytes(data)
  with pytest.raises(files.FileFormatError, match=message):
    files.load_file(tmp_path / name)


def test_missing_file_shows_the_layouts(tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    files.load_file(tmp_path / 'gone.jsonl')
  assert 'gone.jsonl' in str(error.value)
  assert all(schema.layout in str(error.value) for schema in schemas.SCHEMAS.values())


@pytest.mark.parametrize(
  'options, message',
  [
    ({'schema': 'gsm'}, "'gsm' is not 'auto'"),
    ({'split': 'test'}, "split 'test'"),
    ({'on_bad_row': 'ignore'}, "'ignore'"),
    ({'heldout_percent': 0}, 'heldout_percent 0'),
    ({'limit': 0}, 'limit 0'),
  ],
)
def test_bad_options(tmp_path, options, message):
  path = write(tmp_path / 'rows.jsonl', [PLAIN])
  with pytest.raises(ValueError, match=message):
    files.load_file(path, **options)


def test_heldout_split_is_by_content(tmp_path):
  rows = plain_rows(400)
  path, backwards = write(tmp_path / 'a.jsonl', rows), write(tmp_path / 'b.jsonl', rows[::-1])

  def questions(where, split):
    source = files.load_file(where, split=split, heldout_percent=20)
    return [example.messages[0].content for example in source.examples]

  train, heldout = questions(path, 'train'), questions(path, 'validation')
  assert sorted(train + heldout) == sorted(row['question'] for row in rows)
  assert 40 < len(heldout) < 120
  assert questions(backwards, 'validation') == heldout[::-1]
  assert len({example.uid for example in files.load_file(path).examples}) == 400


def test_build_source_reads_files(tmp_path):
  path = write(tmp_path / 'rows.jsonl', plain_rows(30))
  source = sources.build_source({'path': path, 'schema': 'auto', 'limit': 5})
  assert len(source) == 5 and source[-1].answer == '5'
