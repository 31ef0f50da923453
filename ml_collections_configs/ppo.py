"""PPO with a critic.

python -m experiments.train --config=ml_collections_configs/ppo.py:tiny --workdir=DIR
"""

from ml_collections_configs import common


def get_config(arg=None):
  preset = common.preset_name(arg)
  config = common.base(preset)
  config.method = dict(name='ppo') | common.fields(
    num_new=int, group_size=int, iterations=int, gamma=float, lam=float, eps_low=float,
    eps_high=float, dual_clip=float, value_clip=float, value_weight=float, kl_beta=float,
    aggregation=str)
  config.method.num_new = 32 if preset == 'tiny' else 256
  if preset == 'pod':
    config.train.micro_batches = 16
  return config
