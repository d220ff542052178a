"""The CUDA kernels on a GPU: every shape of block, the backend chosen by the dispatch, streams and graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import perp_kernels as pk
from perp_kernels import cuda, dispatch
from perp_kernels.cuda import launch, load, plans

from ...oracles import assert_no_worse, normal, random_weight

pytestmark = pytest.mark.skipif(cuda.unavailable is not None, reason=str(cuda.unavailable))

DTYPES = [torch.bfloat16, torch.float16]
# Tokens for every kernel, full blocks and not; outputs that are whole blocks of 256, of 64, of 4, and odd.
TOKENS = (1, 8, 16, 17, 64, 65, 128, 300, 1024)
SIZES = ((4096, 4096), (1024, 14336), (192, 64), (1540, 704), (77, 128))


def case(N: int, K: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, pk.SparseWeight]:
    dense, _, w = random_weight((N, K), "semi24", dtype)
    return normal(tokens, K, dtype=dtype).cuda(), dense.cuda(), w.to("cuda").prepare()


def check(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    assert_no_worse(y, torch.nn.functional.linear(x, dense, bias), torch.nn.functional.linear(
        x.double(), dense.double(), None if bias is None else bias.double()
    ))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N,K", SIZES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_products(tokens: int, N: int, K: int, dtype: torch.dtype) -> None:
    x, dense, w = case(N, K, tokens, dtype)
    bias = normal(N, dtype=dtype).cuda() if tokens % 2 else None
    with pk.backend("cuda"), dispatch.served() as served:
        y = pk.sparse_linear(x, w, bias)
        again = pk.sparse_linear(x, w, bias)
    assert served == {("tiled24_linear", "cuda")}
    check(y, x, dense, bias)
    assert torch.equal(y, again)


@pytest.mark.parametrize("suffix", plans.SHAPES_90)
def test_every_shape_of_block(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these kernels are of compute capability 9.0")
    monkeypatch.setattr(plans, "choose_90", lambda *_: plans.SHAPES_90[suffix])
    for N, K, tokens in ((4096, 4096, 200), (200, 64, 3), (330, 1088, 131)):
        x, dense, w = case(N, K, tokens, torch.bfloat16)
        with pk.backend("cuda"):
            check(pk.sparse_linear(x, w), x, dense)


@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_the_kernels_of_sm80_on_this_gpu(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the fallback everywhere: NVRTC compiles them for this GPU."""
    gpu = plans.Gpu(80, torch.cuda.get_device_properties(0).multi_processor_count)
    monkeypatch.setattr(launch, "gpu_of", lambda tensor: gpu)
    monkeypatch.setattr("perp_kernels.cuda.semi24.gpu_of", lambda tensor: gpu)
    monkeypatch.setattr(load, "prebuilt", lambda source, capability: None)
    for N, K in SIZES:
        x, dense, w = case(N, K, tokens, torch.float16)
        with pk.backend("cuda"):
            check(pk.sparse_linear(x, w), x, dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096), (75, 192)])
def test_compress_and_repack(shape: tuple[int, int], dtype: torch.dtype) -> None:
    dense, mask, _ = random_weight(shape, "semi24", dtype)
    dense = torch.where(mask, dense, float("nan"))
    dense[mask.nonzero()[0, 0], mask.nonzero()[0, 1]] = -0.0
    expected = pk.pack(dense, mask, "semi24").prepare()
    with dispatch.served() as served:
        packed = pk.pack(dense.cuda(), mask.cuda(), "tiled24")
        assert torch.equal(packed.values.cpu().view(torch.int16), expected.values.view(torch.int16))
        assert torch.equal(packed.index.cpu(), expected.index)
        packed.values.zero_()
        packed.assign_(dense.cuda())
        assert torch.equal(packed.values.cpu().view(torch.int16), expected.values.view(torch.int16))
    assert {("tiled24_pack", "cuda"), ("tiled24_assign_", "cuda")} <= served


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 128])
def test_masked_lora_and_its_merge(dtype: torch.dtype, rank: int) -> None:
    N, K = 1100, 704
    dense, mask, w = random_weight((N, K), "semi24", dtype)
    A, B, x = normal(rank, K, seed=4), normal(N, rank, seed=5), normal(33, K, dtype=dtype).cuda()
    exact = torch.where(mask, dense.double() + 0.5 / rank * (B.double() @ A.double()), 0.0)
    prepared = w.to("cuda").prepare()
    with dispatch.served() as served:
        y = pk.masked_lora_linear(x, prepared, A.cuda(), B.cuda(), 0.5 / rank)
        prepared.add_lowrank_(A.cuda(), B.cuda(), 0.5 / rank)
        merged = pk.sparse_linear(x, prepared)
    assert {op for op, backend in served if backend == "cuda"} == {
        "tiled24_lora_linear", "tiled24_add_lowrank_", "tiled24_linear",
    }  # fmt: skip
    assert torch.equal(y, merged)
    assert_no_worse(prepared.unpack().cpu(), exact.to(dtype), exact, factor=1.01)


def test_gradients() -> None:
    _, _, w = random_weight((192, 128), "semi24", torch.bfloat16)
    prepared = w.to("cuda").prepare()
    x = normal(5, 128, dtype=torch.bfloat16).cuda().requires_grad_()
    A, B = normal(4, 128).cuda().requires_grad_(), normal(192, 4, seed=5).cuda().requires_grad_()
    pk.masked_lora_linear(x, prepared, A, B, 0.5).square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in (x, A, B))


def test_current_stream_and_graph() -> None:
    x, dense, w = case(1024, 1024, 16, torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), pk.backend("cuda"):
        for _ in range(3):
            y = pk.sparse_linear(x, w)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pk.backend("cuda"):
        captured = pk.sparse_linear(x, w)
    x.copy_(normal(16, 1024, dtype=torch.bfloat16, seed=8))
    captured.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    check(captured, x, dense)
    assert not torch.equal(captured, y)


def test_where_the_kernels_come_from_is_told() -> None:
    assert all(load.usable(0, kind) for kind in load.KINDS)
    assert load.origin(0).startswith(("cubin", "NVRTC"))
