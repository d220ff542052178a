"""Sizes of zero: no outputs, no experts, an adapter of rank 0. Tokens of none are tested with each op."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import perp_kernels as pk

from .oracles import LAYOUTS, gradients, normal, random_weight


@pytest.fixture(params=["preferred", "reference"])
def served(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "preferred":
        yield
    else:
        with pk.backend("reference"):
            yield


def empty_weight(layout: str, *shape: int) -> pk.SparseWeight:
    return pk.pack(torch.empty(shape), torch.empty(shape, dtype=torch.bool), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_outputs(served: None, layout: str) -> None:
    w, x, b = empty_weight(layout, 0, 8), normal(3, 8), torch.empty(0)
    A, B = normal(2, 8), torch.empty(0, 2)
    plain = gradients(lambda x, b: pk.sparse_linear(x, w, b), [x, b], torch.empty(3, 0))
    masked = gradients(lambda x, A, B, b: pk.masked_lora_linear(x, w, A, B, 1.0, b), [x, A, B, b], torch.empty(3, 0))
    scaled = gradients(lambda x, A, B, b: pk.scale_lora_linear(x, w, A, B, b), [x, A, B, b], torch.empty(3, 0))
    for y, dx, *rest in (plain, masked, scaled):
        assert y.shape == (3, 0)
        assert torch.equal(dx, torch.zeros(3, 8))
        assert rest[-1].shape == (0,)
    for dA, dB in (masked[2:4], scaled[2:4]):
        assert torch.equal(dA, torch.zeros(2, 8))
        assert dB.shape == (0, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_zero(served: None, layout: str) -> None:
    weight, _, w = random_weight((5, 8), layout)
    x, A, B = normal(3, 8), torch.empty(0, 8), torch.empty(5, 0)
    y, dx, dA, dB = gradients(lambda x, A, B: pk.masked_lora_linear(x, w, A, B, 1.0), [x, A, B], torch.ones(3, 5))
    torch.testing.assert_close(y, x @ weight.t())
    torch.testing.assert_close(dx, weight.sum(0).expand(3, 8))
    assert (dA.shape, dB.shape) == (A.shape, B.shape)
    y, dx, dA, dB = gradients(lambda x, A, B: pk.scale_lora_linear(x, w, A, B), [x, A, B], torch.ones(3, 5))
    assert torch.equal(y, torch.zeros(3, 5))
    assert torch.equal(dx, torch.zeros(3, 8))
    assert (dA.shape, dB.shape) == (A.shape, B.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_experts(served: None, layout: str) -> None:
    w, none = empty_weight(layout, 0, 5, 8), torch.empty(0, dtype=torch.int64)
    x, A, B = torch.empty(0, 8), torch.empty(0, 2, 8), torch.empty(0, 5, 2)

    def check(layer: object, arguments: list[Tensor]) -> None:
        y, *grads = gradients(layer, arguments, torch.empty(0, 5))  # type: ignore[arg-type]
        assert y.shape == (0, 5)
        assert [grad.shape for grad in grads] == [argument.shape for argument in arguments]

    check(lambda x, b: pk.sparse_linear(x, w, b, none), [x, torch.empty(0, 5)])
    check(lambda x, A, B: pk.masked_lora_linear(x, w, A, B, 1.0, None, none), [x, A, B])
    with pytest.raises(ValueError, match="Offsets must rise to the number of tokens, 2"):
        pk.sparse_linear(normal(2, 8), w, None, none)
    assert pk.select(torch.empty(0, 5, 8), "0.5/matrix").shape == (0, 5, 8)
    new, mask = pk.sparsegpt(torch.empty(0, 5, 8), torch.empty(0, 8, 8), "2:4")
    assert new.shape == mask.shape == (0, 5, 8)
    assert pk.gram_(torch.empty(0, 8, 8), x, none).shape == (0, 8, 8)
