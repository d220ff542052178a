"""Extra memory against counts made by hand."""

from __future__ import annotations

import torch
from torch import Tensor

import perp_kernels as pk
from bench import peers
from bench.memory import extra_bytes, native_extra_bytes

N = 256
BYTES = N * N * 4


def test_inputs_and_results_are_not_extra() -> None:
    x = torch.ones(N, N)
    assert extra_bytes(lambda: x + 1) == 0
    assert extra_bytes(lambda: x.t()) == 0
    assert extra_bytes(lambda: x.mul_(2)) == 0


def test_temporaries_count_while_they_live() -> None:
    x = torch.ones(N, N)

    def one_after_the_other() -> Tensor:
        total = x + 1
        for _ in range(3):
            total = total + 1
        return total

    def all_at_once() -> Tensor:
        parts = [x + i for i in range(3)]
        return parts[0] + parts[1] + parts[2]

    # Each sum of the first is alive together with the one made from it; the last is returned.
    assert extra_bytes(one_after_the_other) == 2 * BYTES
    assert extra_bytes(all_at_once) == 4 * BYTES


def test_what_autograd_saves_counts() -> None:
    x = torch.ones(N, N, requires_grad=True)

    def forward_backward() -> list[Tensor]:
        hidden = x.exp()
        y = hidden * hidden
        del hidden
        return [y, *torch.autograd.grad(y, x, torch.ones(()).expand(N, N))]

    assert extra_bytes(forward_backward) >= 2 * BYTES


def test_temporaries_inside_an_op_of_the_package_count() -> None:
    scores = torch.rand(N, N)
    with pk.backend("reference"):
        extra = extra_bytes(lambda: pk.select(scores, pk.Pattern.parse("0.5/row")))
    # A reference that ranks the scores needs at least one index for each.
    assert extra >= BYTES


def test_the_published_layer_keeps_its_effective_weight() -> None:
    W, A, B = torch.rand(N, N), torch.rand(2, N, requires_grad=True), torch.rand(N, 2, requires_grad=True)
    x = torch.rand(4, N)

    def chain() -> list[Tensor]:
        values = [x]
        for _ in range(8):
            values.append(peers.published_masked_lora(values[-1], W, A, B, 2.0))
        return values[1:]

    # Eight effective weights and eight bool masks stay for the backward pass.
    assert 8 * (BYTES + N * N) <= extra_bytes(chain) <= 8 * (BYTES + N * N) + 3 * BYTES


def test_growth_of_the_process_sees_what_torch_does_not_allocate() -> None:
    size = 64 << 20
    assert native_extra_bytes(lambda: len(b"\1" * size)) > 0.9 * size
    assert native_extra_bytes(lambda: torch.ones(size, dtype=torch.uint8)) < 0.1 * size
