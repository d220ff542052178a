"""The kept weights of one layer fitted to what the whole layer computed."""

from __future__ import annotations

import torch
from torch import Tensor

import perp_kernels as pk
from bench import peers
from bench.inputs import generator, mask
from bench.ops.sparsegpt import Arguments as Layer
from bench.ops.sparsegpt import make as make_layer
from bench.registry import Case, Op, Work

CHOLESKY = "Cholesky per row"
DAMP = 0.01

Arguments = tuple[Layer, Tensor]


def ours(arguments: Arguments) -> Tensor:
    layer, kept = arguments
    return pk.masked_refit(layer.weight, kept, layer.H, damp=DAMP)


def by_row(arguments: Arguments) -> Tensor:
    layer, kept = arguments
    return peers.masked_refit(layer.weight, kept, layer.H, DAMP)


def check(arguments: Arguments) -> None:
    """The layer's damped error is within 1 % of the least, by Cholesky in float64, and pruned weights are zero."""
    layer, kept = arguments
    new, least = ours(arguments), by_row((Layer(layer.weight.double(), layer.H.double()), kept))
    H = layer.H.double()
    H.diagonal().add_(DAMP * H.diagonal().mean())
    error, due = (((d @ H) * d).sum().item() for d in (new.double() - layer.weight, least - layer.weight))
    if not error <= 1.01 * due or new[~kept].any():
        raise AssertionError(f"the layer's squared error is {error:.6g}, the least is {due:.6g}")


def case(N: int, K: int, text: str, quick: bool = False) -> Case:
    pattern = pk.Pattern.parse(text)
    kept = K - pattern.pruned(K)
    return Case(
        op="masked_refit",
        shape=f"N={N} K={K} pattern={text}",
        dtype=torch.float32,
        make=lambda seed: (make_layer(N, K, seed), mask(N, K, pattern, generator(seed))),
        ours=ours,
        peers={CHOLESKY: by_row},
        # What any solution reads and writes; conjugate gradients have no number of operations that all must make.
        work=Work(bytes=N * K * (4 + 4 + 1) + K * K * 4, flops=2 * N * kept * kept),
        check=check,
        quick=quick,
    )


OPS = [
    Op(
        "masked_refit",
        [case(64, 128, "0.5", quick=True), *(case(576, K, text) for K in (576, 1536) for text in ("0.5", "2:4"))],
        tests=("test_masked_refit.py",),
    )
]
