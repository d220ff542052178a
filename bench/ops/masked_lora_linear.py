"""MaskLoRA, forward and backward: y = x (W + s M ⊙ (B A))ᵀ with gradients for x, A and B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import perp_kernels as pk
from bench import peers
from bench.inputs import PrunedWeight, check_close, generator, normal, pruned_weight
from bench.registry import LAYERS, LIMIT, Case, Memory, Op, Target, Work

RANK, SCALE = 16, 2.0
MEMORY_TOKENS = 128  # what grows with the tokens are inputs and outputs, which are not extra
PATTERN = "0.5"
PUBLISHED = "published layer"
COMPILED = "published, compiled"
SHARE_OF_TIME = {128: 1 / 1.3, 512: 1 / 1.1, 2048: 1.0}
"""Of the published layer's, at most, by tokens: the large float32 layer has targets."""
Layer = Callable[[Tensor, PrunedWeight, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Adapter:
    weight: PrunedWeight
    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Arguments:
    """A chain of layers (one when timed), its input x [T, K] and the gradient g of its output."""

    x: Tensor
    layers: list[Adapter]
    g: Tensor


def ours(x: Tensor, weight: PrunedWeight, A: Tensor, B: Tensor) -> Tensor:
    return pk.masked_lora_linear(x, weight.packed, A, B, SCALE)


def published(x: Tensor, weight: PrunedWeight, A: Tensor, B: Tensor) -> Tensor:
    return peers.published_masked_lora(x, weight.dense, A, B, SCALE)


def compiled(x: Tensor, weight: PrunedWeight, A: Tensor, B: Tensor) -> Tensor:
    return peers.compiled_masked_lora()(x, weight.dense, A, B, SCALE)


def products(arguments: Arguments) -> list[Tensor]:
    """The three products alone: y, and the gradients of x and of the weight."""
    x, W, g = arguments.x.detach(), arguments.layers[0].weight.dense, arguments.g
    return [x @ W.T, g @ W, g.T @ x]


def forward_backward(layer: Layer) -> Callable[[Arguments], list[Tensor]]:
    """Outputs of every layer, then the gradients of every layer's input and adapters."""

    def run(arguments: Arguments) -> list[Tensor]:
        values = [arguments.x]
        for adapter in arguments.layers:
            values.append(layer(values[-1], adapter.weight, adapter.A, adapter.B))
        wanted = [*values[:-1], *(part for adapter in arguments.layers for part in (adapter.A, adapter.B))]
        return [*values[1:], *torch.autograd.grad(values[-1], wanted, arguments.g)]

    return run


def make(
    T: int, N: int, K: int, dtype: torch.dtype, layout: str, count: int, adapters: torch.dtype = torch.float32
) -> Callable[[int], Arguments]:
    """A chain of `count` layers N x K, every second transposed so that they fit; equal shapes share a frozen weight."""

    def build(seed: int) -> Arguments:
        random = generator(seed)
        shapes = [(N, K) if index % 2 == 0 else (K, N) for index in range(count)]
        weights = {shape: pruned_weight(*shape, PATTERN, layout, dtype, random) for shape in dict.fromkeys(shapes)}
        layers = [
            Adapter(
                weights[rows, columns],
                (normal((RANK, columns), torch.float32, random) / columns**0.5).to(adapters).requires_grad_(),
                (normal((rows, RANK), torch.float32, random) / RANK).to(adapters).requires_grad_(),
            )
            for rows, columns in shapes
        ]
        x = normal((T, K), dtype, random).requires_grad_()
        return Arguments(x, layers, normal((T, shapes[-1][0]), dtype, random))

    return build


def check(arguments: Arguments) -> None:
    adapter = arguments.layers[0]
    x, W, A, B = (tensor.detach().double() for tensor in (arguments.x, adapter.weight.dense, adapter.A, adapter.B))
    update = SCALE * adapter.weight.mask
    effective, g = W + update * (B @ A), arguments.g.double()
    slope = update * (g.T @ x)
    exact = (x @ effective.T, g @ effective, B.T @ slope, slope @ A.T)
    mine, plain = (forward_backward(layer)(arguments) for layer in (ours, published))
    check_close(("the output", "the gradient of x", "the gradient of A", "the gradient of B"), mine, plain, exact)


def case(T: int, N: int, K: int, dtype: torch.dtype, layout: str = "dense", quick: bool = False) -> Case:
    item = dtype.itemsize
    weight = N * K * item if layout == "dense" else N * K * item // 2
    passes = weight + N * K // 8 + T * (N + K) * item
    adapters = RANK * (N + K) * 4
    ours_run, published_run = forward_backward(ours), forward_backward(published)
    return Case(
        op="masked_lora_linear",
        shape=f"T={T} N={N} K={K} r={RANK} pattern={PATTERN} layout={layout}",
        dtype=dtype,
        make=make(T, N, K, dtype, layout, 1),
        ours=ours_run,
        peers={PUBLISHED: published_run},
        # Both passes read the weight, the adapters and x or g; three products: y, the gradients of x and of W.
        work=Work(bytes=2 * passes + T * K * item + 3 * adapters, flops=6 * T * N * K),
        check=check,
        targets=(Target(PUBLISHED, SHARE_OF_TIME[T]),) if N == K == 4096 and dtype == torch.float32 else (),
        memory=Memory(
            make=make(T, N, K, dtype, layout, LAYERS),
            ours=ours_run,
            peers={PUBLISHED: published_run},
            targets=(Target(PUBLISHED, 1 / 8),),
        )
        if T == MEMORY_TOKENS
        else None,
        quick=quick,
    )


GPU_RATIOS = {4096: (1.12, 1 / 1.25, 1 / 1.05), 1024: (1.35, 1 / 1.7, 1 / 1.2)}
"""By tokens: of the time of the three products, of the published layer's and of its compiled form's, at most."""


def gpu_case(T: int, N: int, K: int, layout: str = "bitmap", quick: bool = False) -> Case:
    """In bfloat16, adapters too. The memory is that of as many tokens as are timed."""
    dtype = torch.bfloat16
    general = case(T, N, K, dtype, layout, quick)
    ratios = zip((LIMIT, PUBLISHED, COMPILED), GPU_RATIOS.get(T, ()), strict=False)
    runs = {PUBLISHED: forward_backward(published), COMPILED: forward_backward(compiled)}
    chain = Memory(
        make=make(T, N, K, dtype, layout, LAYERS, dtype),
        ours=general.ours,
        peers={PUBLISHED: runs[PUBLISHED]},
        targets=() if quick else (Target(PUBLISHED, 1 / 8),),
    )
    return replace(
        general,
        shape=f"{general.shape} adapters=bf16",
        make=make(T, N, K, dtype, layout, 1, dtype),
        peers=runs,
        bound=products,
        targets=tuple(Target(peer, ratio) for peer, ratio in ratios),
        memory=chain if quick or T == 1024 else None,
    )


GPU_SHAPES = ((4096, 4096), (4096, 11008), (5120, 13824), (8192, 28672))
GPU_CASES = [
    gpu_case(32, 48, 96, quick=True),
    *(gpu_case(T, N, K) for T in (4096, 1024) for N, K in GPU_SHAPES),
    gpu_case(4096, 4096, 4096, layout="dense"),
]
OPS = [
    Op(
        "masked_lora_linear",
        [
            *(case(T, 576, 1536, torch.float32, quick=T == 128) for T in (128, 512, 2048)),
            *(case(T, 4096, 4096, dtype) for dtype in (torch.float32, torch.bfloat16) for T in (128, 512, 2048)),
            case(512, 4096, 4096, torch.float32, layout="bitmap"),
        ],
        tests=("test_masked_lora_linear.py", "test_native_tile.py", "test_memory.py"),
        gpu_cases=GPU_CASES,
        gpu_tests=("test_adapted.py", "test_registered.py", "test_launched.py"),
    )
]
