"""Kernels for pruned linear layers: packed weights, masked adapters, pruning solvers. Knows nothing of models.

Every op runs in plain torch and uses a faster implementation where this machine has one: `active()` tells which.
"""

from perp_kernels import cpu, triton  # register their implementations
from perp_kernels.dispatch import active, backend
from perp_kernels.layouts import SparseWeight, pack
from perp_kernels.ops.bits import pack_bits, unpack_bits
from perp_kernels.ops.gram import gram_
from perp_kernels.ops.masked_lora_linear import masked_lora_linear
from perp_kernels.ops.masked_refit import masked_refit
from perp_kernels.ops.scale_lora_linear import scale_lora_linear
from perp_kernels.ops.select import select
from perp_kernels.ops.sparse_linear import sparse_linear
from perp_kernels.ops.sparsegpt import sparsegpt
from perp_kernels.ops.swap_round import swap_round_
from perp_kernels.ops.wanda_select import wanda_select
from perp_kernels.pattern import Pattern, PatternError

__version__ = "0.1.0"

__all__ = [
    "Pattern",
    "PatternError",
    "SparseWeight",
    "__version__",
    "active",
    "backend",
    "cpu",
    "gram_",
    "masked_lora_linear",
    "masked_refit",
    "pack",
    "pack_bits",
    "scale_lora_linear",
    "select",
    "sparse_linear",
    "sparsegpt",
    "swap_round_",
    "triton",
    "unpack_bits",
    "wanda_select",
]
