"""What the linear ops allocate, by running their launchers on tensors without data."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton is not installed")

from perp_kernels.triton import adapted
from perp_kernels.triton.launch import Target, recording

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="the interpreter has no recorder"
)

BF16 = torch.bfloat16
T, R = 4096, 16
# Output rows and inputs of the layers in the benchmarks.
SHAPES = [(4096, 4096), (4096, 11008), (5120, 13824), (8192, 28672), (28672, 8192)]


class Allocations(TorchDispatchMode):
    """Collects the bytes of every tensor that an operation returns in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None for r in func._schema.returns)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not is_view and tensor._cdata not in given:
                self.nbytes.append(tensor.nbytes)
        return result


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(N: int, K: int, layout: str, rank: int) -> Iterator[tuple[Callable[[], Any], list[int]]]:
    """(a forward or backward pass, the bytes of what it returns)."""
    values = meta(N, K if layout == "dense" else K // 2)
    weight = (values, meta(N, K // 8, dtype=torch.uint8), None, layout, [N, K])
    A, B, x, dy, needs = meta(rank, K), meta(N, rank), meta(T, K), meta(T, N), [True, True, True, False]
    gradients = [2 * T * K, 2 * rank * K, 2 * N * rank]
    yield lambda: adapted.masked_lora_linear(x, *weight, A, B, 1.5, None, None), [2 * T * N]
    yield lambda: adapted.masked_lora_linear_backward(dy, x, *weight, A, B, 1.5, None, needs), gradients
    yield lambda: adapted.scale_lora_linear(x, *weight, A, B, None, None), [2 * T * N]
    yield lambda: adapted.scale_lora_linear_backward(dy, x, *weight, A, B, None, needs), gradients


@pytest.mark.parametrize("rank", [R, 128])
@pytest.mark.parametrize("layout", ["bitmap", "semi24", "dense"])
@pytest.mark.parametrize("N,K", SHAPES)
def test_the_effective_weight_is_the_one_large_temporary(N: int, K: int, layout: str, rank: int) -> None:
    for call, returned in calls(N, K, layout, rank):
        with recording(Target(90, 132)) as launches, Allocations() as allocations:
            call()
        assert launches
        rest = list(allocations.nbytes)
        for nbytes in [*returned, 2 * N * K]:
            rest.remove(nbytes)
        # Shares of the adapter's gradients: together no more than a byte per weight, whatever the rank. The rest are
        # tensors of the size of the adapter, in float32.
        shares = [nbytes for nbytes in rest if nbytes > 4 * rank * max(N, K)]
        assert max(shares, default=0) < N * K
        assert sum(shares) <= N * K
