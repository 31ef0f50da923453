"""Softmax attention: causal, grouped heads, packed segments, sliding windows, soft caps."""

from kernels.attention.api import attention
from kernels.attention.blocked import attend, causal_masks

__all__ = ('attend', 'attention', 'causal_masks')
