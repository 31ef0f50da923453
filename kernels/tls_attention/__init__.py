"""Sparse attention: two levels for decoding (bounds, 4-bit labels), block tables for training."""

from kernels.tls_attention import pool as pool
from kernels.tls_attention.api import choose as choose
from kernels.tls_attention.api import decode as decode
from kernels.tls_attention.api import read as read
from kernels.tls_attention.api import turnover as turnover
from kernels.tls_attention.block_table import block_attention as block_attention
from kernels.tls_attention.block_table import block_means as block_means
from kernels.tls_attention.block_table import route as route
from kernels.tls_attention.cache import append as append
from kernels.tls_attention.cache import calibrate as calibrate
from kernels.tls_attention.cache import channels_of as channels_of
from kernels.tls_attention.cache import empty as empty
from kernels.tls_attention.cache import pack as pack
from kernels.tls_attention.cache import summarise as summarise
from kernels.tls_attention.cache import weigh as weigh
from kernels.tls_attention.config import Config as Config
from kernels.tls_attention.config import Labels as Labels
from kernels.tls_attention.config import State as State
from kernels.tls_attention.config import Summary as Summary
from kernels.tls_attention.config import problems as problems
