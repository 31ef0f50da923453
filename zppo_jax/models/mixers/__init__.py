"""Token mixers: apply(config, params, x, place, cache, layer, prefix) -> (y, cache), one row each.

`cache` and `layer` are what the mixer remembers and its index in the stack (None: a cache of one
layer); `prefix` is what it remembers of a prompt that neighbouring rows share.
"""

import functools

from zppo_jax.models.config import DELTA_KINDS
from zppo_jax.models.mixers.attention import attention
from zppo_jax.models.mixers.delta import delta_mixer
from zppo_jax.models.mixers.latent import latent_attention
from zppo_jax.models.mixers.place import Place

__all__ = ('MIXERS', 'Place')

MIXERS = {'full': functools.partial(attention, False),
          'sliding': functools.partial(attention, True), 'mla': latent_attention} | {
  kind: functools.partial(delta_mixer, kind) for kind in DELTA_KINDS}
