"""Warm start.

python -m experiments.train --config=ml_collections_configs/sft.py:tiny --workdir=DIR
"""

from ml_collections_configs import common


def get_config(arg=None):
  preset = common.preset_name(arg)
  config = common.base(preset)
  config.method = dict(name='sft') | common.fields(
    num_new=int, aggregation=str, bcq_fraction=float, ncq_fraction=float, label_noise=float,
    max_wrong=int, wording=str, compress_tokens=int)
  if preset == 'tiny':
    config.method.update(num_new=64, wording='short', compress_tokens=6)
    config.num_steps = 300
    config.optim.update(learning_rate=3e-3, warmup_steps=20)
    config.log.update(every_steps=20, dump_every_steps=100)
    config.ckpt.every_steps = 100
  if preset == 'pod':
    config.method.num_new = 1024
    config.train.micro_batches = 16
  return config
