"""The headline: the extra memory of a layer, measured by the allocator's own account."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from perp_kernels import backend, cpu, masked_lora_linear, sparse_linear
from perp_kernels.cpu import tiles
from perp_kernels.ops import _rows

from .oracles import LAYOUTS, normal, random_weight

DEPTH, SIZE, TOKENS, RANK = 8, 768, 64, 16


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that `run` held at once beyond what was alive before it."""
    gc.collect()
    tiles.release_memory()  # what a kernel keeps from earlier calls counts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def extra_bytes(layer: Callable[..., Tensor], x: Tensor, trained: Sequence[Sequence[Tensor]]) -> int:
    """Peak of a forward and backward pass through a chain of layers, less its outputs and the gradients it returns."""
    leaves = [x, *(t for parameters in trained for t in parameters)]

    def run() -> tuple[list[Tensor], tuple[Tensor, ...]]:
        outputs = [x]
        for parameters in trained:
            outputs.append(layer(outputs[-1], *parameters))
        return outputs[1:], torch.autograd.grad(outputs[-1].sum(), leaves)

    outputs, grads = run()
    owed = sum(t.nbytes for t in (*outputs, *grads))
    del outputs, grads
    return peak_bytes(run) - owed


def test_the_account_sees_what_is_held_and_freed() -> None:
    def run() -> Tensor:
        first = torch.ones(1000, 1000)
        second = first + 1
        del first
        return second.sum()

    assert 8_000_000 <= peak_bytes(run) < 8_100_000


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel,part", [("reference", 4), ("cpu", 8)])
def test_masked_lora_needs_a_part_of_the_published_layer(
    layout: str, dtype: torch.dtype, kernel: str, part: int
) -> None:
    if kernel == "cpu" and not cpu.available:
        pytest.skip(cpu.why)
    weight, _, w = random_weight((SIZE, SIZE), layout, dtype)
    x = normal(TOKENS, SIZE, dtype=dtype).requires_grad_()
    trained = [
        [(normal(RANK, SIZE) / SIZE).to(dtype).requires_grad_(), normal(SIZE, RANK).to(dtype).requires_grad_()]
        for _ in range(DEPTH)
    ]
    with backend(kernel):
        ours = extra_bytes(lambda x, A, B: masked_lora_linear(x, w, A, B, 2.0), x, trained)
    published = extra_bytes(lambda x, A, B: F.linear(x, weight + 2.0 * (B @ A).masked_fill(weight == 0, 0)), x, trained)
    # What the published layer holds at least: the effective weight and a bool mask of every layer.
    assert published > DEPTH * SIZE * SIZE * (dtype.itemsize + 1)
    assert ours <= published / part


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_lora_scratch_is_one_chunk_however_large_the_weight(layout: str) -> None:
    rows, columns = 4096, 1024
    _, _, w = random_weight((rows, columns), layout)
    x = normal(8, columns).requires_grad_()
    A, B = normal(4, columns).requires_grad_(), normal(rows, 4).requires_grad_()
    # One chunk of rows in float32 with its mask; the weight has eight such chunks.
    allowed = 1.75 * _rows._CHUNK_BYTES
    assert extra_bytes(lambda x, A, B: masked_lora_linear(x, w, A, B, 2.0), x, [[A, B]]) < allowed
    with torch.no_grad():
        y = masked_lora_linear(x, w, A, B, 2.0)
        assert peak_bytes(lambda: masked_lora_linear(x, w, A, B, 2.0)) - y.nbytes < allowed


def test_frozen_linear_makes_no_weight_gradient() -> None:
    _, _, w = random_weight((SIZE, SIZE), "dense")
    x = normal(TOKENS, SIZE).requires_grad_()
    assert extra_bytes(lambda x: sparse_linear(x, w), x, [[] for _ in range(DEPTH)]) < w.values.nbytes / 2
