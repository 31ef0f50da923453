"""ZPPO: python -m experiments.train --config=ml_collections_configs/zppo.py:tiny --workdir=DIR

--config.method.name picks a baseline of the same step: zppo_grpo, zppo_grpo_buffer, zppo_bcq,
zppo_ncq, zppo_both, zppo_hint, zppo_prefix, zppo_teacher_response. Source: arXiv:2606.18216.
"""

from ml_collections_configs import common


def get_config(arg=None):
  preset = common.preset_name(arg)
  config = common.base(preset)
  config.method = dict(name='zppo') | common.fields(
    num_new=int, group_size=int, teacher_group_size=int, tau=float, rho_replay=float, rho_aug=float,
    buffer_capacity=int, iterations=int, eps_low=float, eps_high=float, dual_clip=float, norm=str,
    norm_scope=str, use_bcq=bool, use_ncq=bool, use_buffer=bool, guide=str, prefix_fraction=float,
    prefix_tokens=int, compress=str, compress_tokens=int, wording=str, teacher_chunk=int)
  if preset == 'tiny':
    config.method.update(num_new=32, iterations=4, buffer_capacity=256, compress='tail',
                         compress_tokens=6, wording='short', teacher_chunk=8, prefix_tokens=24)
  if preset == 'local':
    config.method.update(num_new=64, teacher_chunk=16)
  return config
