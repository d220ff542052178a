"""Sizes at which a test sees several tiles, and an op served by Triton alone.

The interpreter gets few rows in tiles of 16; a GPU gets more rows in the tiles really used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

import perp_kernels as pk
from perp_kernels import dispatch
from perp_kernels.triton import launch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
LAUNCHED = os.environ.get("PERP_GPU", "0") != "0"
# The same on a GPU under a tool that slows it down.
SMALL = os.environ.get("PERP_GPU", "0") == "small"

# The interpreter gets bfloat16 wrong, silently.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if LAUNCHED else [])]

# What a test's sizes are multiplied by: on a GPU an odd number, and one that leaves every row aligned.
SCALES = [9, 16] if LAUNCHED and not SMALL else [1]

_TILES = {"BN": 16, "BK": 16, "BT": 16}
_CONFIGURATIONS = {
    "gram": {"BLOCK": 16, "BT": 16},
    "effective": {"BN": 16, "BK": 32},
    "few_tokens": {"BN": 16, "BK": 16, "PARTS": 2},
    "value_gradient": _TILES,
    "adapter_gradients": _TILES,
    "prune_block": {"BN": 16},
    "select_groups": {"GROUPS": 16},
    "select_row": {"PART": 16},
    "pair_rows": {"BN": 16, "BU": 16, "BP": 16},
    "pair_groups": {"BN": 16, "BU": 16},
    "trade": {"BLOCK": 16},
}


@contextmanager
def triton(*ops: str) -> Iterator[None]:
    """Serves the block by Triton, and checks that it was the named ops that ran."""
    tiles = nullcontext() if LAUNCHED else launch.override(**_CONFIGURATIONS)
    with pk.backend("triton"), tiles, dispatch.served() as served:
        yield
    assert served == {(op, "triton") for op in ops}
