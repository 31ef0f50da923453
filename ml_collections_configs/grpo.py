"""GRPO and family.

python -m experiments.train --config=ml_collections_configs/grpo.py:tiny --workdir=DIR

--config.method.name picks the member: grpo, rloo, dr_grpo, dapo, gspo, cispo, reinforce,
reinforce_pp, reinforce_pp_baseline, remax.
"""

from ml_collections_configs import common


def get_config(arg=None):
  preset = common.preset_name(arg)
  config = common.base(preset)
  config.method = dict(name='grpo') | common.fields(
    num_new=int, group_size=int, iterations=int, estimator=str, norm=str, surrogate=str,
    eps_low=float, eps_high=float, dual_clip=float, delta=float, weight_max=float, aggregation=str,
    max_tokens=int, gamma=float, kl_beta=float, kl_kind=str, kl_in_reward=bool,
    entropy_weight=float, correction=str, correction_cap=float, dynamic_sampling=bool,
    max_draws=int, overlong_buffer=int, filter_overlong=bool)
  config.method.num_new = 32 if preset == 'tiny' else 128
  if preset == 'pod':
    config.train.micro_batches = 16
  return config
