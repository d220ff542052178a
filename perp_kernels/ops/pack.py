"""pack: a dense weight and its mask bits to the components of a layout.

    pack(weight [R, K], bits uint8 [R, ceil(K/8)], layout) -> (values, index, row_ptr or None)

in the canonical form of `perp_kernels.layouts`. For semi24 every group of four keeps exactly two. The number of values
depends on the mask, so this runs outside traced code and is no torch.library op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perp_kernels import dispatch
from perp_kernels.ops._rows import clear_pruned_
from perp_kernels.ops._tiled24 import tile_index, tile_values
from perp_kernels.ops.bits import bits_to_semi24, unpack_mask_rows


def _reference(weight: Tensor, bits: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor | None]:
    R, K = weight.shape
    kept = unpack_mask_rows(bits, K, "bitmap")
    if layout == "dense":
        return clear_pruned_(weight.clone(memory_format=torch.contiguous_format), kept), bits, None
    flat = weight[kept]
    if layout == "semi24":
        return flat.view(R, K // 2), bits_to_semi24(bits), None
    counts = kept.sum(1)
    if R == 0 or bool((counts == counts[0]).all()):
        return flat.view(R, flat.numel() // max(R, 1)), bits, None
    return flat, bits, torch.nn.functional.pad(counts.cumsum(0), (1, 0))


dispatch.register("pack", "reference", _reference)


def pack(weight: Tensor, bits: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """The components of `weight` under the mask bits `bits`: see the contract above."""
    return dispatch.select("pack", weight, bits, layout)(weight, bits, layout)


def _tiled24_reference(weight: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    values, index, _ = pack(weight, bits, "semi24")
    return tile_values(values), tile_index(index)


dispatch.register("tiled24_pack", "reference", _tiled24_reference)


def tiled24_pack(weight: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """values and index in the order tiled24 of a 16-bit weight [N, K], K % 64 == 0, of which each four keep two."""
    return dispatch.select("tiled24_pack", weight, bits)(weight, bits)
