"""The main job: warm starts, then ZPPO beside GRPO+buffer at equal rollouts, in minutes on 2 cores.

python -m experiments.quickstart --config=ml_collections_configs/quickstart.py --workdir=DIR
python -m experiments.quickstart --config=... --workdir=DIR --config.data.path=FILE.jsonl

`data`, `rollout`, `seed` and `log` hold for every stage; the stages change the rest.
"""

from ml_collections import config_dict

from ml_collections_configs import common, sft, zppo


def get_config(arg=None):
  preset = common.preset_name(arg or 'tiny')
  config = config_dict.ConfigDict()
  shared = common.base(preset)
  for name in ('seed', 'data', 'rollout', 'log', 'eval', 'ckpt', 'launch', 'mesh', 'agent'):
    config[name] = shared[name]

  config.student = sft.get_config(preset)
  config.student.num_steps = 300
  config.student.method.update(bcq_fraction=0.25, ncq_fraction=0.25, label_noise=0.6)
  config.teacher = sft.get_config(preset)
  config.teacher.num_steps = 500
  config.teacher.optim.decay_steps = 500

  config.zppo = zppo.get_config(preset)
  config.zppo.num_steps = 60
  config.grpo = zppo.get_config(preset)
  config.grpo.method.name = 'zppo_grpo_buffer'
  for stage in (config.zppo, config.grpo):
    stage.method.num_new = 24
    stage.optim.learning_rate = 2e-4
    stage.eval.every_steps = 10
  return config
