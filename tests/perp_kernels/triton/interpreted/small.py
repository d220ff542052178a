"""Configurations small enough that a few rows make several tiles, and the op served by Triton alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import perp_kernels as pk
from perp_kernels import dispatch
from perp_kernels.triton import launch

_TILES = {"BN": 16, "BK": 16, "BT": 16}


@contextmanager
def triton(*ops: str) -> Iterator[None]:
    """Serves the block by Triton in tiles of 16, and checks that it was the named ops that ran."""
    configurations = {
        "gram": {"BLOCK": 16, "BT": 16},
        "effective": {"BN": 16, "BK": 32},
        "few_tokens": {"BN": 16, "BK": 16, "TOKENS": 16, "PARTS": 2},
        "value_gradient": _TILES,
        "adapter_gradients": _TILES,
        "prune_block": {"BN": 16},
        "select_groups": {"GROUPS": 16},
        "select_row": {"PART": 16},
        "pair_rows": {"BN": 16, "BU": 16, "BP": 16},
        "pair_groups": {"BN": 16, "BU": 16},
        "trade": {"BLOCK": 16},
    }
    with pk.backend("triton"), launch.override(**configurations), dispatch.served() as served:
        yield
    assert served == {(op, "triton") for op in ops}
