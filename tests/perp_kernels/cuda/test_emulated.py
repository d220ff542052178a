"""The kernels themselves, run on the CPU by a machine as unkind as the PTX manual allows: see emulator/machine.h."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import perp_kernels as pk
from perp_kernels.cuda import semi24
from perp_kernels.cuda.plans import Gpu

from ..oracles import assert_no_worse, normal, random_mask, random_weight
from .emulation import A100, H100, emulated, library

SMALL = Gpu(90, 1)
"""A Hopper GPU of one processor, which no launch leaves idle: the fewest parts, the widest blocks."""

# gpu, N, K, tokens, the kernel that has to be the one: each at least once, with blocks that are not full in outputs (of
# 64, 128 and 256) and in tokens, with more input tiles than stages, with fewer, and with fewer than parts.
CASES = [
    (A100, 64, 64, 1, "t16"),
    (A100, 70, 640, 16, "t16"),
    (A100, 130, 256, 17, "t64"),
    (Gpu(80, 1), 130, 256, 100, "t128"),
    (A100, 65, 256, 129, "t128"),
    (H100, 64, 64, 1, "t16_p4"),
    (H100, 200, 2432, 9, "t16_p4"),
    (SMALL, 130, 1280, 16, "t16_p2"),
    (H100, 190, 1856, 40, "t64_p4"),
    (SMALL, 3, 192, 64, "t64_p2"),
    (H100, 130, 1728, 65, "t128_p4"),
    (Gpu(90, 4), 250, 576, 150, "t128_p1"),
    (SMALL, 400, 576, 100, "t128_wide"),
    (SMALL, 400, 576, 130, "t128_pair"),
    (Gpu(90, 8), 270, 128, 300, "t128_pair"),
]


def case(N: int, K: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, pk.SparseWeight]:
    dense, _, w = random_weight((N, K), "semi24", dtype)
    return normal(tokens, K, dtype=dtype), dense, w.prepare()


def check(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    own_bias = 0 if bias is None else bias
    plain = (x.float() @ dense.float().T + own_bias).to(x.dtype)
    exact = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    assert_no_worse(y, plain, exact)


@pytest.mark.parametrize("gpu,N,K,tokens,kernel", CASES)
def test_products(gpu: Gpu, N: int, K: int, tokens: int, kernel: str) -> None:
    dtype = torch.float16 if tokens % 2 else torch.bfloat16
    x, dense, w = case(N, K, tokens, dtype)
    bias = [None, normal(N, dtype=dtype), normal(N)][N % 3]
    with emulated(gpu, seed=tokens) as launches:
        y = semi24.tiled24_linear(x, w.values, w.index, [N, K], bias)
    assert launches[0].kernel.endswith(f"_semi24_gemm_{kernel}")
    check(y, x, dense, bias)


@pytest.mark.parametrize("gpu", [A100, H100], ids=["sm80", "sm90"])
def test_the_order_of_threads_and_copies_changes_no_bit(gpu: Gpu) -> None:
    x, _, w = case(70, 704, 5, torch.bfloat16)
    results = []
    for seed in range(3):
        with emulated(gpu, seed):
            results.append(semi24.tiled24_linear(x, w.values, w.index, [70, 704], None))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("gpu", [A100, H100], ids=["sm80", "sm90"])
def test_strided_tokens_and_rows_that_begin_anywhere(gpu: Gpu) -> None:
    x, dense, w = case(66, 128, 6, torch.bfloat16)
    wide = torch.full((7, 200), float("nan"), dtype=torch.bfloat16)
    for view in (wide[1:, 8:136], wide[1:, 3:131], wide[1:, :128]):
        view.copy_(x)
        with emulated(gpu):
            check(semi24.tiled24_linear(view, w.values, w.index, [66, 128], None), x, dense, None)
    with emulated(gpu):
        y = semi24.tiled24_linear(x.view(2, 3, 128), w.values, w.index, [66, 128], None)
        assert y.shape == (2, 3, 66)
        assert semi24.tiled24_linear(x[:0], w.values, w.index, [66, 128], None).shape == (0, 66)


def test_a_prepared_weight_that_begins_anywhere_is_refused() -> None:
    x, _, w = case(64, 64, 1, torch.bfloat16)
    shifted = torch.empty(64 * 32 + 1, dtype=torch.bfloat16)[1:].view(64, 32).copy_(w.values)
    with emulated(H100), pytest.raises(ValueError, match="begin at a multiple of 16 bytes"):
        semi24.tiled24_linear(x, shifted, w.index, [64, 64], None)


@pytest.mark.parametrize("gpu", [A100, H100], ids=["sm80", "sm90"])
def test_nothing_is_written_outside_the_result(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result lies between guards; every token count and both an odd and a whole number of outputs."""
    guards: list[tuple[Tensor, Tensor]] = []

    def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = torch.Size(shape).numel()
        around = torch.full((count + 128,), 1.25, dtype=dtype)
        guards.append((around[:64], around[64 + count :]))
        return around[64 : 64 + count].view(shape)

    empty = torch.empty
    for N, tokens in ((67, 3), (68, 17), (4, 1)):
        x, dense, w = case(N, 64, tokens, torch.bfloat16)
        monkeypatch.setattr(torch, "empty", guarded)
        with emulated(gpu):
            y = semi24.tiled24_linear(x, w.values, w.index, [N, 64], None)
        monkeypatch.setattr(torch, "empty", empty)
        check(y, x, dense, None)
    assert guards
    assert all((edge == 1.25).all() for pair in guards for edge in pair)


def special(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, pk.SparseWeight]:
    """A dense weight with -0, NaN and infinity at kept places and NaN at all pruned ones."""
    mask = random_mask(shape, "semi24")
    dense = torch.where(mask, normal(*shape), float("nan")).to(dtype)
    kept = mask.nonzero()
    for value, (row, column) in zip((-0.0, 0.0, float("nan"), float("inf")), kept.tolist(), strict=False):
        dense[row, column] = value
    return dense, mask, pk.pack(dense, mask, "semi24").prepare()


def same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.int16), right.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (75, 192)])
def test_compress_and_repack(shape: tuple[int, int], dtype: torch.dtype) -> None:
    dense, mask, w = special(shape, dtype)
    with emulated(A100):
        values, index = semi24.tiled24_pack(dense, pk.pack_bits(mask))
        assert same(values, w.values)
        assert torch.equal(index, w.index)
        values.fill_(7.0)
        semi24.tiled24_assign_(values, index, [*shape], torch.nn.functional.pad(dense, (0, 8))[:, : shape[1]])
    assert same(values, w.values)
    assert torch.equal(index, w.index)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_added_at_kept_places_and_rounded_once(dtype: torch.dtype) -> None:
    N, K, r = 75, 128, 5
    dense, mask, w = random_weight((N, K), "semi24", dtype)
    prepared = w.prepare()
    A, B = normal(r, K, seed=4), normal(N, r, seed=5)
    exact = torch.where(mask, dense.double() + 0.5 * (B.double() @ A.double()), 0.0)
    merged, x = prepared.values.clone(), normal(3, K, dtype=dtype)
    A = torch.empty(r * K + 1)[1:].view(r, K).copy_(A)  # where no vector may be read
    with emulated(H100):
        semi24.tiled24_add_lowrank_(merged, prepared.index, [N, K], A, B, 0.5)
        adapted = semi24.tiled24_lora_linear(x, prepared.values, prepared.index, [N, K], A, B, 0.5, None)
        after = semi24.tiled24_linear(x, merged, prepared.index, [N, K], None)
    assert torch.equal(adapted, after)
    effective = pk.SparseWeight(merged, prepared.index, None, (N, K), "tiled24").unpack()
    assert_no_worse(effective, exact.to(dtype), exact, factor=1.01)
    assert not effective[~mask].any()


# Each kernel makes one mistake; the machine has to say which.
MISTAKES = {
    "unfenced": "no proxy fence",
    "unwaited": "while a copy is on its way",
    "unwritten": "nothing was written",
    "stray": "outside every buffer",
    "misaligned": "a misaligned cp.async",
    "beyond": "outside the block's memory",
    "arrivals": "more arrivals",
    "phase": "deadlock: 32 threads of block 0 warp 0 at an mbarrier",
    "half_the_block": "deadlock: 32 threads of block 0 warp 0 at the block's barrier",
    "overwritten": "while a copy is on its way",
    "metadata": "no rising pair",
    "in_flight": "still on its way when the block ends",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_machine_finds(name: str) -> None:
    for seed in range(3):
        found = library().mistake(name.encode(), seed)
        assert found is not None
        assert MISTAKES[name] in found.decode()
    assert library().mistake(b"none", 0) is None
