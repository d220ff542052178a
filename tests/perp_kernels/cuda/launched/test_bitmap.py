"""The decoding kernels for bitmap weights on a GPU: shapes, layouts of rows, parts, streams and graphs."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import perp_kernels as pk
from perp_kernels import cuda, dispatch
from perp_kernels.cuda import bitmap_plans, launch, load, plans

from ...oracles import assert_no_worse, normal, random_weight

pytestmark = pytest.mark.skipif(cuda.unavailable is not None, reason=str(cuda.unavailable))

DTYPES = [torch.bfloat16, torch.float16]
# Under compute-sanitizer the shapes are small. Else: one block and many, whole and not in outputs and inputs, in parts.
SIZES = (
    ((1, 1), (35, 2500), (40, 1101))
    if os.environ.get("PERP_GPU") == "small"
    else ((4096, 4096), (1024, 14336), (1, 1), (35, 2500), (40, 1101), (5003, 800))
)


def case(N: int, K: int, tokens: int, dtype: torch.dtype, equal: bool) -> tuple[Tensor, Tensor, pk.SparseWeight]:
    if equal:
        mask = normal(N, K, seed=3).argsort(1) < (K + 1) // 2
        dense = torch.where(mask, normal(N, K, seed=1) / K**0.5, 0.0).to(dtype)
        w = pk.pack(dense, mask, "bitmap")
    else:
        dense, _, w = random_weight((N, K), "bitmap", dtype)
    assert (w.row_ptr is None) == equal or N == 1
    return normal(tokens, K, dtype=dtype).cuda(), dense.cuda(), w.to("cuda")


def check(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    exact = torch.nn.functional.linear(x.double(), dense.double(), None if bias is None else bias.double())
    assert_no_worse(y, torch.nn.functional.linear(x, dense, bias), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N,K", SIZES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 15, 16])
def test_products(tokens: int, N: int, K: int, dtype: torch.dtype) -> None:
    for equal in (False, True):
        x, dense, w = case(N, K, tokens, dtype, equal)
        bias = normal(N, dtype=dtype).cuda() if tokens % 2 else None
        with dispatch.served() as served:
            y, again = pk.sparse_linear(x, w, bias), pk.sparse_linear(x, w, bias)
        assert served == {("sparse_linear", "cuda")}
        check(y, x, dense, bias)
        assert torch.equal(y, again)


@pytest.mark.parametrize("shape", bitmap_plans.SHAPES, ids=lambda shape: shape.suffix)
@pytest.mark.parametrize("parts", [1, 3])
def test_every_shape_of_block(shape: bitmap_plans.Shape, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    room = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    if shape.shared > room:
        pytest.skip(f"a block of this GPU has {room} bytes of shared memory")
    monkeypatch.setattr(bitmap_plans, "choose", lambda *_: (shape, parts))
    for N, K in ((77, 2100), (4096, 1600)):
        x, dense, w = case(N, K, shape.tokens - 1, torch.bfloat16, equal=False)
        with pk.backend("cuda"):
            check(pk.sparse_linear(x, w), x, dense)


def test_the_compiler_at_run_time_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, w = case(70, 1000, 5, torch.float16, equal=False)
    with pk.backend("cuda"):
        expected = pk.sparse_linear(x, w)
        monkeypatch.setattr(load, "prebuilt", lambda source, capability: None)
        for cached in (load.module, launch._function):
            cached.cache_clear()
        assert torch.equal(pk.sparse_linear(x, w), expected)


def test_gradients_come_from_another_backend() -> None:
    x, dense, w = case(64, 96, 3, torch.bfloat16, equal=True)
    x.requires_grad_()
    with dispatch.served() as served:
        pk.sparse_linear(x, w).sum().backward()
    assert ("sparse_linear", "cuda") in served
    assert ("sparse_linear_backward", "cuda") not in served
    assert_no_worse(x.grad, dense.sum(0).expand(3, -1), dense.double().sum(0).expand(3, -1))


def test_current_stream_and_graph() -> None:
    x, dense, w = case(1024, 4096, 4, torch.bfloat16, equal=True)
    assert bitmap_plans.choose(1024, 4096, 4, plans.Gpu(90, 132))[1] > 1
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), pk.backend("cuda"):
        for _ in range(3):
            y = pk.sparse_linear(x, w)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pk.backend("cuda"):
        captured = pk.sparse_linear(x, w)
    x.copy_(normal(4, 4096, dtype=torch.bfloat16, seed=8))
    captured.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    check(captured, x, dense)
    assert not torch.equal(captured, y)
