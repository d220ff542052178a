"""SparseWeight: a pruned weight as a few plain tensors.

A weight [N, K], or E of them [E, N, K], has R = N or E * N output rows; every component has rows first, so that a
component sharded by rows is that of the sharded weight. The canonical form, which is also the form on disk:

    layout   values                                  index, uint8 [R, ceil(K/8)]
    dense    [R, K], +0 where pruned                 bit j of byte i = column 8 i + j, 1 = kept; bits past K are 0
    bitmap   [R, C], the kept values of each row     as dense
             in column order where all rows keep C;
             else flat [nnz], row r at
             row_ptr[r] .. row_ptr[r + 1], with
             row_ptr int64 [R + 1]
    semi24   [R, K/2], in column order; K % 4 == 0   a nibble per group of four columns, low nibble first: the kept
                                                     positions p0 | p1 << 2, p0 < p1; nibbles past K are 0

A semi24 weight may be brought into the order tiled24, which sparse tensor cores read (`SparseWeight.prepare`,
`perp_kernels/ops/_tiled24.py`). It takes the place of the canonical form on the device and is never written to disk.

Kept is what the mask says, never what is non-zero: a kept 0 or -0 is stored like any other value and counts as kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from perp_kernels.arrays import as_tensor
from perp_kernels.ops import pack as _pack
from perp_kernels.ops import tiled24
from perp_kernels.ops._arguments import check_adapter
from perp_kernels.ops._rows import PackedRows
from perp_kernels.ops._tiled24 import TILED24, check_tileable, padded_rows, tile_index, tile_values
from perp_kernels.ops.bits import kept_in_rows, pack_bits, unpack_mask
from perp_kernels.ops.merge import add_lowrank_, mul_lowrank_
from perp_kernels.ops.unpack import unpack

LAYOUTS = ("dense", "bitmap", "semi24")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class SparseWeight:
    """The components of a packed weight with its shape and layout; `pack` makes one.

    It owns no memory of its own: a module keeps the components as Parameters and builds a SparseWeight over them in
    its forward pass, which torch.compile traces. The constructor checks nothing; `from_components` does.
    """

    __slots__ = ("index", "layout", "row_ptr", "shape", "values")

    def __init__(
        self, values: Tensor, index: Tensor, row_ptr: Tensor | None, shape: tuple[int, ...], layout: str
    ) -> None:
        self.values = values
        self.index = index
        self.row_ptr = row_ptr
        self.shape = shape
        self.layout = layout

    @classmethod
    def from_components(
        cls, components: Mapping[str, Any], shape: tuple[int, ...], layout: str, validate: bool = True
    ) -> SparseWeight:
        """A weight over what `components()` gave, such as a file's tensors. `validate` reads all of them and raises
        ValueError unless they are the canonical form."""
        parts = {name: as_tensor(component) for name, component in components.items()}
        if not {"values", "index"} <= parts.keys() <= {"values", "index", "row_ptr"}:
            raise ValueError(f"A packed weight has values, index and at most row_ptr, not {', '.join(sorted(parts))}.")
        weight = cls(parts["values"], parts["index"], parts.get("row_ptr"), tuple(shape), layout)
        if validate:
            _validate(weight)
        return weight

    def components(self) -> dict[str, Tensor]:
        """The tensors by name: values, index and, where rows keep different counts, row_ptr."""
        named = {"values": self.values, "index": self.index}
        if self.row_ptr is not None:
            named["row_ptr"] = self.row_ptr
        return named

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of all components."""
        return sum(component.nbytes for component in self.components().values())

    @property
    def nnz(self) -> int:
        """Number of kept weights, kept zeros included."""
        if self.layout == TILED24:
            return math.prod(self.shape) // 2
        return int(self.mask().sum()) if self.layout == "dense" else self.values.numel()

    def mask(self) -> Tensor:
        """The mask, bool of the weight's shape, True = kept."""
        w = self.canonical()
        return unpack_mask(w.index, w.shape[-1], w.layout).view(w.shape)

    def unpack(self) -> Tensor:
        """The dense weight, a new tensor with +0 where pruned; not differentiable."""
        w = self.canonical()
        return unpack(w.values.detach(), w.index, w.row_ptr, w.shape[-1], w.layout).view(w.shape)

    def prepare(self) -> SparseWeight:
        """This semi24 weight in the order tiled24, new tensors that take the place of its own; a tiled one itself.

        It is for a [N, K] weight of 16-bit values with K % 64 == 0. Raises ValueError or TypeError for any other.
        """
        if self.layout == TILED24:
            return self
        check_tileable(self.shape, self.dtype, self.layout)
        return SparseWeight(tile_values(self.values.detach()), tile_index(self.index), None, self.shape, TILED24)

    def canonical(self) -> SparseWeight:
        """The inverse of `prepare`, to the bit; a weight of any other layout itself."""
        if self.layout != TILED24:
            return self
        values, index, _, layout, _ = tiled24.canonical(self.values.detach(), self.index, list(self.shape))
        return SparseWeight(values, index, None, self.shape, layout)

    def assign_(self, weight: Any) -> SparseWeight:
        """Overwrite the kept values by those of a dense weight of this shape and dtype; the mask stays."""
        weight = as_tensor(weight).detach()
        if weight.shape != self.shape or weight.dtype != self.dtype:
            raise ValueError(
                f"A weight {list(self.shape)} of {self.dtype} takes the values of its like, not those of "
                f"{list(weight.shape)} of {weight.dtype}."
            )
        if self.layout == TILED24:
            tiled24.assign_(self.values.detach(), self.index, self.shape, weight)
        else:
            rows = weight.reshape(-1, self.shape[-1])
            packed = PackedRows(self.values.detach(), self.index, self.row_ptr, self.layout, self.shape[-1])
            packed.store(0, len(rows), rows.clone() if self.layout == "dense" else rows)
        return self

    def add_lowrank_(self, A: Any, B: Any, scale: float) -> SparseWeight:
        """Merge an adapter of `masked_lora_linear` in place, W += scale * M * (B A): see `perp_kernels.ops.merge`."""
        A, B = as_tensor(A).detach(), as_tensor(B).detach()
        check_adapter(self, A, B)
        if self.layout == TILED24:
            tiled24.add_lowrank_(self.values.detach(), self.index, self.shape, A, B, float(scale))
            return self
        add_lowrank_(self.values.detach(), self.index, self.row_ptr, self.layout, self.shape, A, B, float(scale))
        return self

    def mul_lowrank_(self, A: Any, B: Any) -> SparseWeight:
        """Merge an adapter of `scale_lora_linear` in place, W *= B A: see `perp_kernels.ops.merge`."""
        A, B = as_tensor(A).detach(), as_tensor(B).detach()
        check_adapter(self, A, B)
        w = self.canonical()
        mul_lowrank_(w.values.detach(), w.index, w.row_ptr, w.layout, w.shape, A, B)
        if self.layout == TILED24:
            self.values.detach().copy_(tile_values(w.values))
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SparseWeight:
        """This weight on another device or with values of another dtype; components already so are shared."""
        if self.layout == TILED24 and dtype is not None:
            check_tileable(self.shape, dtype, "semi24")
        row_ptr = None if self.row_ptr is None else self.row_ptr.to(device=device)
        values = self.values.to(device=device, dtype=dtype)
        return SparseWeight(values, self.index.to(device=device), row_ptr, self.shape, self.layout)

    def __repr__(self) -> str:
        return f"SparseWeight({list(self.shape)}, {self.layout}, {self.dtype}, {self.device})"


def pack(weight: Any, mask: Any, layout: str = "bitmap") -> SparseWeight:
    """Pack `weight` [N, K] or [E, N, K] under a bool mask of the same shape, True = kept.

    `layout` is one of `LAYOUTS`, or "tiled24": what `prepare` makes of the layout semi24, without the way round.

    The components are new tensors; what `weight` holds where the mask is False is dropped, NaN included. Raises
    ValueError where the layout cannot hold the mask: semi24 keeps exactly two of each four consecutive inputs.
    """
    weight, mask = as_tensor(weight), as_tensor(mask)
    if layout not in (*LAYOUTS, TILED24):
        raise ValueError(f'There is no layout "{layout}": choose one of {", ".join((*LAYOUTS, TILED24))}.')
    if weight.dtype not in DTYPES:
        raise TypeError(f"A weight is float32, bfloat16, float16 or float64, not {weight.dtype}.")
    if weight.dim() not in (2, 3) or weight.shape[-1] == 0:
        raise ValueError(f"A weight is [N, K] or [E, N, K] with K at least 1, not {list(weight.shape)}.")
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(f"A mask is bool {list(weight.shape)} like its weight, not {mask.dtype} {list(mask.shape)}.")
    K = weight.shape[-1]
    rows, kept = weight.detach().reshape(-1, K), mask.reshape(-1, K)
    if layout in ("semi24", TILED24):
        _check_semi24(kept)
    if layout == TILED24:
        check_tileable(tuple(weight.shape), weight.dtype, "semi24")
        return SparseWeight(*_pack.tiled24_pack(rows, pack_bits(kept)), None, tuple(weight.shape), layout)
    values, index, row_ptr = _pack.pack(rows, pack_bits(kept), layout)
    return SparseWeight(values, index, row_ptr, tuple(weight.shape), layout)


def _check_semi24(kept: Tensor) -> None:
    K = kept.shape[1]
    if K % 4:
        raise ValueError(f'Layout semi24 needs a multiple of 4 inputs, not {K}: use layout "bitmap".')
    counts = kept.view(-1, K // 4, 4).sum(2)
    wrong = (counts != 2).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        raise ValueError(
            f"Layout semi24 keeps exactly two of each four inputs, but output row {row} keeps "
            f'{int(counts[row, group])} of inputs {4 * group} to {4 * group + 3}: use layout "bitmap".'
        )


def _validate(weight: SparseWeight) -> None:
    values, index, row_ptr, layout = weight.values, weight.index, weight.row_ptr, weight.layout

    def need(condition: bool, rule: str) -> None:
        if not condition:
            raise ValueError(f"Not a packed weight of layout {layout} and shape {list(weight.shape)}: {rule}.")

    if layout == TILED24:
        check_tileable(weight.shape, weight.dtype, "semi24")
        P, K = padded_rows(weight.shape[0]), weight.shape[1]
        need(values.shape == (P, K // 2), f"values are [{P}, {K // 2}]")
        need(index.dtype == torch.uint8 and index.shape == (P, K // 8), f"index is uint8 [{P}, {K // 8}]")
        restored = weight.canonical()
        _validate(restored)
        again = restored.prepare()
        need(bool((again.index == index).all()), "rows past the last keep positions 0 and 1")
        return
    need(layout in LAYOUTS, f"the layout is one of {', '.join(LAYOUTS)}")
    need(len(weight.shape) in (2, 3) and weight.shape[-1] > 0, "the shape is [N, K] or [E, N, K], K at least 1")
    K, R = weight.shape[-1], math.prod(weight.shape[:-1])
    width = (K + 7) // 8
    need(values.dtype in DTYPES, f"values are floating point, not {values.dtype}")
    need(index.dtype == torch.uint8 and index.shape == (R, width), f"index is uint8 [{R}, {width}]")
    need(row_ptr is None or layout == "bitmap", "only bitmap has row_ptr")
    if layout == "semi24":
        need(K % 4 == 0, "the number of inputs is a multiple of 4")
        need(K % 8 == 0 or not bool((index[:, -1] >> 4).any()), "index nibbles past the last column are 0")
    else:
        need(K % 8 == 0 or not bool((index[:, -1] >> K % 8).any()), "index bits past the last column are 0")
    if layout == "dense":
        need(values.shape == (R, K), f"values are [{R}, {K}]")
        need(not bool(values.detach()[~unpack_mask(index, K, layout)].any()), "values are 0 where pruned")
        return
    counts = kept_in_rows(index, layout)
    if layout == "semi24":
        need(values.shape == (R, K // 2), f"values are [{R}, {K // 2}]")
        need(bool((counts == K // 2).all()), "each nibble of index holds two positions in rising order")
    elif row_ptr is None:
        need(values.dim() == 2 and len(values) == R, f"values without row_ptr are [{R}, C]")
        need(bool((counts == values.shape[1]).all()), "each row of index keeps as many columns as values has")
    else:
        ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        need(row_ptr.dtype == torch.int64 and row_ptr.shape == (R + 1,), f"row_ptr is int64 [{R + 1}]")
        need(bool((row_ptr == ends).all()), "row_ptr sums the columns that each row of index keeps")
        need(values.shape == (int(ends[-1]),), f"values are flat [{int(ends[-1])}]")
