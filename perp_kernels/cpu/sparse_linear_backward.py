"""sparse_linear_backward by the native kernels: the weight decoded a tile at a time for torch's products."""

from __future__ import annotations

from torch import Tensor

from perp_kernels.cpu import native, tiles
from perp_kernels.ops import sparse_linear


def sparse_linear_backward(
    grad_y: Tensor,
    x: Tensor | None,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    offsets: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of sparse_linear; ValueError for components that contradict each other."""
    w = tiles.DecodedTiles(values, index, row_ptr, layout, shape)
    return sparse_linear.backward(w, grad_y, x, values, shape, offsets, needs)


def _supports(grad_y: Tensor, x: Tensor | None, values: Tensor, index: Tensor, *_: object) -> bool:
    return grad_y.device.type == "cpu" and tiles.supported(values, index)


native.register("sparse_linear_backward", sparse_linear_backward, _supports)
