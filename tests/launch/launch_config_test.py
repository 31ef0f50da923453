"""Config problems: each check, its message, and the comparison of configs."""

import json

import ml_collections
import pytest

from zppo_jax.core.errors import ConfigError
from zppo_jax.launch import config


def messages(problems):
  return [f'{p.field}: {p.message}' for p in problems]


CHECKS = [
  (config.check_enum('norm', 'none', ('none', 'batch')), []),
  (
    config.check_enum('norm', 'bacth', ('none', 'batch')),
    ["norm: 'bacth': did you mean 'batch'?"],
  ),
  (config.check_enum('norm', 'zzz', ('none', 'batch')), ["norm: 'zzz': choose from batch, none"]),
  (config.check_range('tau', 0.5, low=0, high=1, open_low=True), []),
  (config.check_range('tau', 1, low=0, high=1, open_low=True), []),
  (
    config.check_range('tau', 0.0, low=0, high=1, open_low=True),
    ['tau: must be in (0, 1], got 0.0'],
  ),
  (config.check_range('rho', -1, low=0), ['rho: must be at least 0, got -1']),
  (config.check_range('rho', 0, low=0, open_low=True), ['rho: must be above 0, got 0']),
  (config.check_range('rho', 3, high=2), ['rho: must be at most 2, got 3']),
  (config.check_range('rho', 2, high=2, open_high=True), ['rho: must be below 2, got 2']),
  (config.check_range('rho', float('nan'), low=0), ['rho: must be at least 0, got nan']),
  (config.check_range('rho', True, low=0), ['rho: must be a number, got True']),
  (config.check_range('rho', '1', low=0), ["rho: must be a number, got '1'"]),
  (config.check_divisible('batch', 96, 8, by='devices'), []),
  (
    config.check_divisible('batch', 100, 8, by='devices'),
    ['batch: 100 is not a multiple of devices = 8; nearest: 96 or 104'],
  ),
  (
    config.check_divisible('batch', 3, 8, by='devices'),
    ['batch: 3 is not a multiple of devices = 8; nearest: 8'],
  ),
  (
    config.check_divisible('batch', 0, 8, by='devices'),
    ['batch: 0 is not a multiple of devices = 8; nearest: 8'],
  ),
  (config.check_divisible('batch', 4, 0, by='devices'), ['batch: devices = 0 must be positive']),
  (config.unknown_keys(['lr'], ('lr', 'tau')), []),
  (
    config.unknown_keys(['tua', 'lr'], ('lr', 'tau'), 'method'),
    ["method.tua: unknown field: did you mean 'tau'?"],
  ),
  (config.check_paths_writable(''), ['workdir: is empty']),
  (
    config.check_paths_writable('gs://bucket/run'),
    ["workdir: 'gs://bucket/run': must be a local or mounted path"],
  ),
  (config.check_paths_writable(__file__), [f'workdir: {__file__} is not a folder']),
  (config.check_paths_writable(__file__ + '/sub'), [f'workdir: {__file__} is not a folder']),
]


@pytest.mark.parametrize('problems, want', CHECKS)
def test_messages(problems, want):
  assert messages(problems) == want


def test_new_folder_is_writable(tmp_path):
  assert config.check_paths_writable(tmp_path / 'a' / 'b') == []


def test_all_problems_in_one_error():
  config.raise_all([])
  with pytest.raises(ConfigError, match='^tau: bad$'):
    config.raise_all([config.Problem('tau', 'bad')])
  with pytest.raises(ConfigError) as error:
    config.raise_all([config.Problem('a', 'x'), config.Problem('b.c', 'y')])
  assert str(error.value) == '2 problems in the config:\n  a: x\n  b.c: y'


def make(**changes):
  base = dict(lr=0.1, betas=(0.9, 0.99), optim=dict(name='adam', decay=0.1), log=dict(every=1))
  result = ml_collections.ConfigDict(base)
  result.update_from_flattened_dict(changes)
  return result


def test_diff():
  assert config.diff_configs(make(), make()) == []
  other = make(**{'optim.decay': 0.2})
  other.seed = 3
  assert config.diff_configs(make(), other) == ['optim.decay: 0.1 -> 0.2', 'seed: (none) -> 3']
  assert config.diff_configs(make(), json.loads(config.to_json(make()))) == []


def test_hash_ignores_logging_only():
  base = config.config_hash(make())
  assert len(base) == 16
  assert base == config.config_hash(make(**{'log.every': 7}))
  assert base != config.config_hash(make(**{'optim.decay': 0.2}))
  assert base == config.config_hash(json.loads(config.to_json(make())))
  assert config.config_hash(make(**{'log.every': 7}), exclude=()) != config.config_hash(
    make(), exclude=()
  )


def test_references_are_resolved():
  result = make()
  result.warmup = result.get_oneway_ref('lr') * 10
  result.lr = 0.5
  assert json.loads(config.to_json(result))['warmup'] == 5.0
