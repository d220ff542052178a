"""The CUDA kernels compiled for GPUs that need not be there."""

from __future__ import annotations

import pytest

from bench.cuda_resources import BUILDS, SHARED, compile_source, family, main_loop, nvcc, per_weight
from perp_kernels.cuda import bitmap_plans, load, plans
from perp_kernels.cuda.plans import Gpu

# A block's limit, and a processor's (CUDA C++ Programming Guide, technical specifications): sm_86 and sm_89 run the
# code of sm_80 and have the least.
BLOCK_LIMIT = {"sm80": 99 << 10, "sm90": 227 << 10}
PROCESSOR_LIMIT = {"sm80": 164 << 10, "sm90": 228 << 10}
RESERVED = 1 << 10
REGISTERS = 64 << 10

# Instructions a weight that an H100 issues in the time of the weight's bytes (docs/gpu.md), a fifth of its slots idle.
BUDGET = 0.8 * 10.7

# The two types share all code but a conversion and an instruction's name: each architecture is compiled for one.
COMPILED = [
    ("semi24_pack", "sm_80"),
    ("sm80_bf16_bitmap_linear", "sm_80"),
    ("sm80_fp16_bitmap_linear", "sm_90a"),
    ("sm80_bf16_semi24_gemm", "sm_80"),
    ("sm80_fp16_semi24_gemm", "sm_100"),
    ("sm90_bf16_semi24_gemm", "sm_90a"),
]


@pytest.mark.skipif(nvcc() is None, reason="there is no nvcc here, so the CUDA kernels are not compiled")
@pytest.mark.parametrize("source,arch", COMPILED)
def test_kernels_compile_without_spills_to_tensor_cores(source: str, arch: str) -> None:
    kernels, log = compile_source(source, arch)
    assert "serialized" not in log, "wgmma would wait for each product"
    names = {one.kernel for one in kernels}
    if source.endswith("bitmap_linear"):
        assert names == {f"{source}_{shape.suffix}" for shape in bitmap_plans.SHAPES} | {f"{source}_sum"}
    elif source.startswith("sm90"):
        assert names == {f"{source}_{suffix}" for suffix in plans.SHAPES_90}
    elif source.startswith("sm80"):
        assert names == {f"{source}_{shape.suffix}" for shape in plans.SHAPES_80} | {f"{source}_sum"}
    for one in kernels:
        assert (one.spilled, one.stack) == (0, 0), one
        if one.instructions is not None and family(source) and not one.kernel.endswith("_sum"):
            typed = "BF16" in " ".join(one.instructions)
            assert one.instructions, one
            assert typed == ("bf16" in source), one
        if one.per_weight is not None:
            assert one.per_weight <= BUDGET, one
            assert one.registers <= REGISTERS // (2 * bitmap_plans.THREADS), one


def test_a_share_is_counted_in_the_loop_that_multiplies() -> None:
    code = ["S2R", "FFMA", "@!P0 BRA P3, 0x10", "LDS", "@P0 BRA 0x60", "HMMA.16816", "@P0 BRA 0x30", "EXIT", "BRA 0x80"]
    listing = [(16 * i, text) for i, text in enumerate(code)]
    assert main_loop(listing) == ["LDS", "@P0 BRA 0x60", "HMMA.16816", "@P0 BRA 0x30"]
    assert per_weight("sm80_bf16_bitmap_linear_t8_r16_s4", listing) == 4 / 32
    assert per_weight("sm80_bf16_semi24_gemm_t16", listing) is None


def test_what_is_compiled_is_what_gpus_are_given() -> None:
    given = {
        (source, load.shipped_for(capability))
        for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3))
        for kind in load.KINDS
        for source in load.sources_for(capability, kind)
    }
    assert given == {(source, arch) for source, archs in BUILDS.items() for arch in archs}
    assert {arch for _, arch in COMPILED} == {arch for _, arch in given}


@pytest.mark.parametrize("shape", [*plans.SHAPES_80, *plans.SHAPES_90.values()], ids=lambda shape: shape.suffix)
def test_blocks_fit_a_processor(shape: plans.Shape80 | plans.Shape90) -> None:
    kind = "sm80" if isinstance(shape, plans.Shape80) else "sm90"
    assert SHARED[shape.suffix] <= BLOCK_LIMIT[kind]
    blocks = shape.blocks if isinstance(shape, plans.Shape80) else 2 if shape.tokens <= 64 else 1
    assert blocks * (shape.shared + RESERVED) <= PROCESSOR_LIMIT[kind]


@pytest.mark.parametrize("shape", bitmap_plans.SHAPES, ids=lambda shape: shape.suffix)
def test_two_blocks_that_decode_fit_a_processor(shape: bitmap_plans.Shape) -> None:
    kind = "sm90" if shape.stages == 4 else "sm80"
    assert shape.shared <= BLOCK_LIMIT[kind]
    assert 2 * (shape.shared + RESERVED) <= PROCESSOR_LIMIT[kind]


@pytest.mark.parametrize(
    "N,tokens,suffix",
    [
        (4096, 1, "t16_p4"),
        (4096, 33, "t64_p4"),
        (14336, 16, "t16_p2"),
        (4096, 128, "t128_p4"),
        (4096, 512, "t128_p1"),
        (4096, 4096, "t128_pair"),
        (14336, 16384, "t128_pair"),
    ],
)
def test_shapes_chosen_on_an_h100(N: int, tokens: int, suffix: str) -> None:
    assert plans.choose_90(N, tokens, Gpu(90, 132)).suffix == suffix


@pytest.mark.parametrize(
    "N,K,tokens,expected",
    [
        (4096, 4096, 1, ("t16", 6)),
        (4096, 64, 1, ("t16", 1)),
        (28672, 4096, 64, ("t64", 1)),
        (4096, 4096, 4096, ("t128", 1)),
    ],
)
def test_shapes_and_parts_chosen_on_an_a100(N: int, K: int, tokens: int, expected: tuple[str, int]) -> None:
    shape, parts = plans.choose_80(N, K, tokens, Gpu(80, 108))
    assert (shape.suffix, parts) == expected
