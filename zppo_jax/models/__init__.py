"""Decoders as plain pytrees: a config, an abstract parameter tree, and a pure forward."""

from zppo_jax.models.config import ModelConfig as ModelConfig
from zppo_jax.models.decoder import Output as Output
from zppo_jax.models.decoder import forward as forward
from zppo_jax.models.load import load as load
from zppo_jax.models.load import save as save
from zppo_jax.models.params import init as init
