"""The native CPU kernels: one module per op, each of which registers itself, over the extension `perp_kernels._C`."""

from perp_kernels.cpu import (
    adapted,
    gram,
    pack,
    select,
    sparse_linear,
    sparse_linear_backward,
    sparsegpt,
    swap_round,
    tiles,
    wanda_select,
)
from perp_kernels.cpu.native import active_path, available, cpu_features, set_path, why

__all__ = [
    "active_path",
    "adapted",
    "available",
    "cpu_features",
    "gram",
    "pack",
    "select",
    "set_path",
    "sparse_linear",
    "sparse_linear_backward",
    "sparsegpt",
    "swap_round",
    "tiles",
    "wanda_select",
    "why",
]
