"""Distillation.

python -m experiments.train --config=ml_collections_configs/distill.py:tiny --workdir=DIR

--config.method.name picks distill_on (JSD on student tokens), distill_off (JSD on right teacher
answers) or opd (sampled reverse KL as an advantage). All need --config.teacher.checkpoint.
"""

from ml_collections_configs import common


def get_config(arg=None):
  preset = common.preset_name(arg)
  config = common.base(preset)
  config.method = dict(name='distill_on') | common.fields(
    num_new=int, group_size=int, teacher_group_size=int, source=str, signal=str, divergence=str,
    beta=float, temperature=float, discount=float, use_buffer=bool, rho_replay=float, tau=float,
    buffer_capacity=int, teacher_chunk=int, chunk=int)
  if preset == 'tiny':
    config.method.update(num_new=32, buffer_capacity=256, teacher_chunk=8)
  return config
