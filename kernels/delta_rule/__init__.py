"""The asymmetric delta rule: FG2-GDN, FG2-GDN+, KDA, GDN, DeltaNet and gated linear attention."""

from kernels.delta_rule.api import delta_rule, step
from kernels.delta_rule.context import delta_rule_sharded
from kernels.delta_rule.inputs import (
  delta_net_inputs,
  fg2_inputs,
  fg2_plus_inputs,
  gdn2_inputs,
  gdn_inputs,
  gla_inputs,
  kda_inputs,
)

__all__ = ('delta_net_inputs', 'delta_rule', 'delta_rule_sharded', 'fg2_inputs', 'fg2_plus_inputs',
           'gdn2_inputs', 'gdn_inputs', 'gla_inputs', 'kda_inputs', 'step')
