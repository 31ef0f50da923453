"""Sampling: logit rules, the jitted decode loop, and scoring of given tokens."""

from zppo_jax.sampling.decode import Prompts as Prompts
from zppo_jax.sampling.decode import Settings as Settings
from zppo_jax.sampling.decode import generate as generate
