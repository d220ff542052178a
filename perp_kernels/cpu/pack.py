"""pack and unpack by the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from perp_kernels.cpu import native

ELEMENTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def pack(weight: Tensor, bits: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packs a dense weight into the canonical form of `layout`.

    Args:
        weight: [R, K] bf16, fp16, fp32 or fp64.
        bits: uint8 [R, ceil(K/8)], the packed mask (1 = kept, padding bits 0).
        layout: "dense", "bitmap" or "semi24".

    Returns:
        values, index, row_ptr: bitmap values are [R, C] where every row keeps C columns, else flat with row_ptr int64
        [R + 1]; row_ptr is None for all else.

    Raises:
        ValueError: sizes that do not fit, a padding bit set, or (semi24) a group that does not keep exactly two.
    """
    extension = native.extension()
    weight, bits = weight.detach(), bits.contiguous()
    if weight.dim() == 2:
        weight = native.by_rows(weight)
    source, index = native.view("weight", weight), native.view("index", bits)
    if layout == "dense":
        values = torch.empty(weight.shape, dtype=weight.dtype)
        extension.pack_dense(source, index, native.view("values", values))
        return values, bits, None
    rows, columns = weight.shape
    if layout == "semi24":
        positions = torch.empty_like(bits)
        extension.bits_to_positions(index, columns, native.view("positions", positions))
        values = torch.empty((rows, columns // 2), dtype=weight.dtype)
        extension.pack_bitmap(source, index, native.view("values", values), None)
        return values, positions, None
    if layout != "bitmap":
        raise ValueError(f'layout must be "dense", "bitmap" or "semi24", not "{layout}"')
    counts = torch.empty(rows, dtype=torch.int64)
    extension.count_bits(index, columns, native.view("counts", counts))
    if rows == 0 or bool((counts == counts[0]).all()):
        values = torch.empty((rows, int(counts[0]) if rows else 0), dtype=weight.dtype)
        row_ptr = None
    else:
        row_ptr = torch.zeros(rows + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=row_ptr[1:])
        values = torch.empty(int(row_ptr[-1]), dtype=weight.dtype)
    extension.pack_bitmap(
        source, index, native.view("values", values), None if row_ptr is None else native.view("row_ptr", row_ptr)
    )
    return values, bits, row_ptr


def unpack(values: Tensor, index: Tensor, row_ptr: Tensor | None, K: int, layout: str) -> Tensor:
    """The dense [R, K] weight of a canonical form, +0 where pruned: the inverse of `pack`.

    Raises:
        ValueError: components that contradict each other (an index whose rows do not hold as many kept columns as
            values does, a row_ptr that does not rise from 0 to the number of values, a nibble that is no semi24 pair).
    """
    extension = native.extension()
    values, index = values.detach().contiguous(), index.contiguous()
    if layout == "dense":
        return values.clone()
    bits = index
    if layout == "semi24":
        bits = torch.empty_like(index)
        extension.positions_to_bits(native.view("index", index), K, native.view("bits", bits))
    elif layout != "bitmap":
        raise ValueError(f'layout must be "dense", "bitmap" or "semi24", not "{layout}"')
    out = torch.empty((index.shape[0], K), dtype=values.dtype)
    starts = None if row_ptr is None else native.view("row_ptr", row_ptr)
    extension.unpack_bitmap(native.view("values", values), native.view("index", bits), starts, native.view("out", out))
    return out


def _supports(tensor: Tensor, *_: object) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in ELEMENTS


native.register("pack", pack, _supports)
native.register("unpack", unpack, _supports)
