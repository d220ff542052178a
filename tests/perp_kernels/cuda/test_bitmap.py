"""The decoding kernel for bitmap weights, run on the CPU by the emulator, from 1 to 16 tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import perp_kernels as pk
from perp_kernels import cuda, dispatch
from perp_kernels.cuda import bitmap, bitmap_plans
from perp_kernels.cuda.plans import Gpu

from ..oracles import assert_no_worse, normal
from .emulation import A100, H100, emulated

SMALL, SMALL_A100 = Gpu(90, 1), Gpu(80, 1)
"""GPUs of one processor, which no launch leaves idle: the inputs are not cut into parts."""

# gpu, N, K, tokens, the kernel and the parts that have to be: blocks of 16 and 32 outputs that are full or not, more
# steps of 512 and 256 inputs than stages and fewer, words and bytes of the index that end with the row or do not.
CASES = [
    (H100, 1, 1, 1, "t8_r16_s4", 1),
    (SMALL, 16, 512, 8, "t8_r16_s4", 1),
    (H100, 35, 1000, 1, "t8_r16_s4", 1),
    (SMALL, 20, 2510, 3, "t8_r16_s4", 1),
    (SMALL, 35, 2500, 1, "t8_r32_s4", 1),
    (SMALL, 64, 1032, 6, "t8_r32_s4", 1),
    (Gpu(86, 1), 18, 2080, 5, "t8_r32_s3", 1),
    (Gpu(80, 2), 35, 2080, 5, "t8_r16_s3", 1),
    (SMALL, 33, 1600, 9, "t16_r32_s4", 1),
    (SMALL_A100, 40, 1101, 16, "t16_r32_s3", 1),
    (H100, 17, 2600, 2, "t8_r16_s4", 3),
    (A100, 40, 1290, 12, "t16_r32_s3", 3),
]


def masked(N: int, K: int, share: float = 0.5, seed: int = 0) -> Tensor:
    """Rows of unequal counts; the first keeps nothing where there are more, the last keeps all."""
    mask = torch.rand(N, K, generator=torch.Generator().manual_seed(seed)) < share
    if N > 1:
        mask[0] = False
        mask[-1] = True
    return mask


def equal(N: int, K: int, kept: int) -> Tensor:
    """Rows that all keep as many."""
    return normal(N, K, seed=3).argsort(1) < kept


def pack(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, pk.SparseWeight]:
    weight = torch.where(mask, normal(*mask.shape, seed=1) / mask.shape[1] ** 0.5, 0.0).to(dtype)
    return weight, pk.pack(weight, mask, "bitmap")


def run(x: Tensor, w: pk.SparseWeight, bias: Tensor | None = None) -> Tensor:
    assert bitmap.takes(x, w.values, w.layout, [*w.shape])
    return bitmap.sparse_linear(x, w.values, w.index, w.row_ptr, w.layout, [*w.shape], bias, None)


def check(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    plain = (x.float() @ weight.float().T + (0 if bias is None else bias)).to(x.dtype)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_no_worse(y, plain, exact)


@pytest.mark.parametrize("gpu,N,K,tokens,kernel,parts", CASES)
def test_products(gpu: Gpu, N: int, K: int, tokens: int, kernel: str, parts: int) -> None:
    dtype = torch.float16 if tokens % 2 else torch.bfloat16
    weight, w = pack(masked(N, K), dtype)
    assert N == 1 or w.row_ptr is not None
    x, bias = normal(tokens, K, dtype=dtype), [None, normal(N, dtype=dtype), normal(N)][N % 3]
    with emulated(gpu, seed=tokens) as launches:
        y = run(x, w, bias)
    assert launches[0].kernel.endswith(f"_bitmap_linear_{kernel}")
    assert launches[0].grid[1] == parts
    assert len(launches) == (1 if parts == 1 else 2)
    check(y, x, weight, bias)


@pytest.mark.parametrize("tokens", range(1, 17))
def test_every_number_of_tokens(tokens: int) -> None:
    dtype = torch.bfloat16 if tokens % 2 else torch.float16
    weight, w = pack(masked(21, 328), dtype)
    x = normal(tokens, 328, dtype=dtype)
    with emulated(SMALL, seed=tokens):
        check(run(x, w), x, weight)


@pytest.mark.parametrize("tokens", [2, 11])
@pytest.mark.parametrize("N,K,kept", [(19, 1100, 550), (18, 1040, 1), (33, 777, 775), (5, 520, 515)])
def test_rows_of_equal_count(N: int, K: int, kept: int, tokens: int) -> None:
    """They begin at every multiple of their count; the last copy of the weight is not a whole one."""
    weight, w = pack(equal(N, K, kept), torch.bfloat16)
    assert w.row_ptr is None
    x = normal(tokens, K, dtype=torch.bfloat16)
    with emulated(SMALL):
        check(run(x, w), x, weight)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.9, 1.0])
@pytest.mark.parametrize("tokens", [1, 16])
def test_any_share_may_be_kept(share: float, tokens: int) -> None:
    mask = masked(34, 1090, share)
    mask[-1] = share == 1.0
    weight, w = pack(mask, torch.float16)
    x = normal(tokens, 1090, dtype=torch.float16)
    with emulated(SMALL):
        y = run(x, w)
    check(y, x, weight)
    assert not y[:, 0].any()


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("gpu", [SMALL, A100])
def test_the_order_of_threads_and_copies_changes_no_bit(gpu: Gpu, tokens: int) -> None:
    _, w = pack(masked(40, 2600), torch.bfloat16)
    x, results = normal(tokens, 2600, dtype=torch.bfloat16), []
    for seed in range(4):
        with emulated(gpu, seed) as launches:
            results.append(run(x, w))
    assert (launches[0].grid[1] > 1) == (gpu is A100)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_value_reaches_another_column_or_row(dtype: torch.dtype) -> None:
    """An infinite weight meets a token of 1, its neighbours one of 0, with which it would be NaN; a pruned place times
    an infinite token is NaN, as it is in the dense product; a kept -0 is one."""
    mask = masked(24, 600) | equal(24, 600, 300)
    weight = torch.where(mask, normal(24, 600, seed=1), 0.0).to(dtype)
    columns = torch.stack([row.nonzero()[7 * i, 0] for i, row in enumerate(mask)])
    infinite, negative = torch.arange(0, 24, 2), torch.arange(1, 24, 2)
    weight[infinite, columns[infinite]] = float("inf")
    weight[negative, columns[negative]] = -0.0
    w, x = pk.pack(weight, mask, "bitmap"), torch.zeros(2, 600, dtype=dtype)
    x[0, columns] = 1.0
    x[1, 5] = float("inf")
    with emulated(SMALL):
        y = run(x, w)
    assert y[0, infinite].isposinf().all()
    check(y[:1, negative], x[:1], weight[negative])
    assert y[1].isnan()[~mask[:, 5]].all()


def test_strided_tokens_and_rows_that_begin_anywhere() -> None:
    weight, w = pack(masked(20, 136), torch.bfloat16)
    x = normal(6, 136, dtype=torch.bfloat16)
    wide = torch.full((7, 200), float("nan"), dtype=torch.bfloat16)
    for view in (wide[1:, 8:144], wide[1:, 3:139], wide[1:, :136]):
        view.copy_(x)
        with emulated(SMALL):
            check(run(view, w), x, weight)
    with emulated(SMALL):
        assert run(x.view(2, 3, 136), w).shape == (2, 3, 20)
        assert torch.equal(run(x.t().contiguous().t(), w), run(x, w))


def test_an_index_that_begins_anywhere() -> None:
    weight, w = pack(masked(20, 544), torch.float16)
    index = torch.empty(20 * 68 + 3, dtype=torch.uint8)[3:].view(20, 68).copy_(w.index)
    x = normal(2, 544, dtype=torch.float16)
    with emulated(SMALL):
        y = run(x, pk.SparseWeight(w.values, index, w.row_ptr, w.shape, w.layout))
    check(y, x, weight)


def test_nothing_is_written_outside_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    guards: list[tuple[Tensor, Tensor]] = []

    def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = torch.Size(shape).numel()
        around = torch.full((count + 128,), 1.25, dtype=dtype)
        guards.append((around[:64], around[64 + count :]))
        around[64 : 64 + count] = float("nan")
        return around[64 : 64 + count].view(shape)

    for gpu, N, tokens in ((SMALL, 19, 3), (SMALL, 36, 16), (A100, 21, 5), (A100, 4, 1)):
        weight, w = pack(masked(N, 2100), torch.bfloat16)
        x = normal(tokens, 2100, dtype=torch.bfloat16)
        with monkeypatch.context() as patch, emulated(gpu):
            patch.setattr(torch, "empty", guarded)
            y = run(x, w)
        check(y, x, weight)
    assert len(guards) > 4
    assert all((edge == 1.25).all() for pair in guards for edge in pair)


def test_calls_that_the_kernel_takes() -> None:
    _, w = pack(masked(64, 64), torch.bfloat16)
    x = normal(16, 64, dtype=torch.bfloat16)
    assert bitmap.takes(x, w.values, "bitmap", [64, 64])
    shifted = torch.empty(w.values.numel() + 1, dtype=torch.bfloat16)[1:].copy_(w.values)
    for tokens, values, layout, shape in (
        (normal(17, 64, dtype=torch.bfloat16), w.values, "bitmap", [64, 64]),
        (x[:0], w.values, "bitmap", [64, 64]),
        (x.float(), w.values.float(), "bitmap", [64, 64]),
        (x, w.values, "dense", [64, 64]),
        (x, w.values, "bitmap", [2, 32, 64]),
        (x, w.values, "bitmap", [0, 64]),
        (x, shifted, "bitmap", [64, 64]),
    ):
        assert not bitmap.takes(tokens, values, layout, shape)


def test_without_a_gpu_other_backends_serve() -> None:
    if cuda.unavailable is None:
        pytest.skip("there is a GPU")
    weight, w = pack(masked(64, 64), torch.bfloat16)
    x = normal(2, 64, dtype=torch.bfloat16)
    with dispatch.served() as served:
        check(pk.sparse_linear(x, w), x, weight)
    assert ("sparse_linear", "cuda") not in served
    assert f"cuda: {cuda.unavailable}" in pk.active()["sparse_linear"][1]
    with (
        pk.backend("cuda"),
        pytest.raises(ValueError, match="No cuda implementation serves this call of sparse_linear"),
    ):
        pk.sparse_linear(x, w)


@pytest.mark.parametrize(
    "gpu,N,K,tokens,expected",
    [
        (H100, 4096, 4096, 1, ("t8_r16_s4", 1)),
        (H100, 4096, 4096, 16, ("t16_r32_s4", 2)),
        (H100, 1024, 4096, 8, ("t8_r16_s4", 4)),
        (H100, 28672, 8192, 1, ("t8_r32_s4", 1)),
        (H100, 8192, 28672, 8, ("t8_r32_s4", 1)),
        (H100, 64, 512, 1, ("t8_r16_s4", 1)),
        (A100, 4096, 11008, 9, ("t16_r32_s3", 1)),
        (Gpu(89, 128), 1024, 4096, 1, ("t8_r16_s3", 2)),
        (Gpu(89, 128), 4096, 4096, 1, ("t8_r32_s3", 1)),
        (Gpu(100, 148), 8192, 28672, 16, ("t16_r32_s4", 1)),
    ],
)
def test_shapes_and_parts_chosen(gpu: Gpu, N: int, K: int, tokens: int, expected: tuple[str, int]) -> None:
    shape, parts = bitmap_plans.choose(N, K, tokens, gpu)
    assert (shape.suffix, parts) == expected
