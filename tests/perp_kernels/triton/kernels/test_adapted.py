"""masked_lora_linear, scale_lora_linear and their merges, in every layout, against float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import perp_kernels as pk
from tests.perp_kernels.oracles import DEVICE, LAYOUTS, assert_no_worse, gradients, normal, random_weight

from .small import DTYPES, SCALES, triton

SCALE = 1.5


def op(how: str, w: pk.SparseWeight) -> Callable[..., Tensor]:
    if how == "masked_lora_linear":
        return lambda x, A, B, bias: pk.masked_lora_linear(x, w, A, B, SCALE, bias)
    return lambda x, A, B, bias: pk.scale_lora_linear(x, w, A, B, bias)


def dense_op(how: str, weight: Tensor, mask: Tensor) -> Callable[..., Tensor]:
    def layer(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        W = weight.to(x.dtype)
        if how == "masked_lora_linear":
            effective = W + SCALE * (B @ A).to(x.dtype).masked_fill(~mask, 0)
        else:
            effective = W * (B @ A).to(x.dtype)
        return F.linear(x, effective, bias)

    return layer


@pytest.mark.parametrize("dtype,r", list(zip(DTYPES, (17, 1, 16), strict=False)), ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["masked_lora_linear", "scale_lora_linear"])
def test_forward_and_gradients(how: str, layout: str, scale: int, dtype: torch.dtype, r: int) -> None:
    N, K, T = 19 * scale, 36 * scale, 18 * scale
    weight, mask, w = random_weight((N, K), layout, dtype)
    x, bias = normal(1, T, K, dtype=dtype), normal(N, dtype=dtype)
    A, B = normal(r, K, dtype=dtype, seed=6) / 4, normal(N, r, dtype=dtype, seed=7) / 4
    arguments, grad_y = [x, A, B, bias], normal(1, T, N, dtype=dtype, seed=9)
    with triton(how, f"{how}_backward"):
        got, again = (gradients(op(how, w), arguments, grad_y) for _ in range(2))
    plain = gradients(dense_op(how, weight, mask), arguments, grad_y)
    exact = gradients(dense_op(how, weight, mask), [a.double() for a in arguments], grad_y)
    for g, a, p, e in zip(got, again, plain, exact, strict=True):
        assert_no_worse(g, p, e, factor=3.0)
        assert torch.equal(g, a)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["masked_lora_linear", "scale_lora_linear"])
def test_a_merged_weight_is_the_one_its_adapter_multiplied_by(how: str, layout: str) -> None:
    N, K = 19 * SCALES[0], 36 * SCALES[0]
    _, mask, w = random_weight((N, K), layout, torch.float16)
    A, B = normal(5, K, seed=6), normal(N, 5, seed=7)
    identity, zero = torch.eye(K, dtype=torch.float16, device=DEVICE), torch.zeros(N, device=DEVICE)
    with triton(how):
        effective = op(how, w)(identity, A, B, zero).t()
    merge = "add_lowrank_" if how == "masked_lora_linear" else "mul_lowrank_"
    with triton(merge):
        if merge == "add_lowrank_":
            w.add_lowrank_(A, B, SCALE)
        else:
            w.mul_lowrank_(A, B)
    assert torch.equal(w.unpack(), effective)
    assert not bool(w.unpack()[~mask].any())
    pk.SparseWeight.from_components(w.components(), w.shape, w.layout)


def test_only_what_is_asked_for() -> None:
    weight, mask, w = random_weight((19, 36), "bitmap")
    x, A, B = normal(7, 36), normal(3, 36, seed=6), normal(19, 3, seed=7)
    zero, ones = torch.zeros(19, device=DEVICE), torch.ones(7, 19, device=DEVICE)
    full = gradients(dense_op("masked_lora_linear", weight, mask), [x, A, B, zero], ones)
    for i in range(3):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, A, B))]
        with triton("masked_lora_linear", "masked_lora_linear_backward"):
            pk.masked_lora_linear(leaves[0], w, leaves[1], leaves[2], SCALE).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == j for j in range(3)]
        torch.testing.assert_close(leaves[i].grad, full[1 + i])


def test_experts() -> None:
    weight, mask, w = random_weight((3, 6, 20), "bitmap")
    x, offsets = normal(9, 20), torch.tensor([2, 2, 9], device=DEVICE)
    A, B, bias = normal(3, 4, 20, seed=6), normal(3, 6, 4, seed=7), normal(3, 6, seed=8)

    def layer(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return pk.masked_lora_linear(x, w, A, B, SCALE, bias, offsets)

    def dense(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        parts = [(0, slice(0, 2)), (2, slice(2, 9))]
        layers = {e: dense_op("masked_lora_linear", weight[e], mask[e]) for e, _ in parts}
        return torch.cat([layers[e](x[rows], A[e], B[e], bias[e]) for e, rows in parts])

    grad_y = normal(9, 6, seed=9)
    with triton("masked_lora_linear", "masked_lora_linear_backward"):
        got = gradients(layer, [x, A, B, bias], grad_y)
    for g, e in zip(got, gradients(dense, [x, A, B, bias], grad_y), strict=True):
        torch.testing.assert_close(g, e)
    with triton("add_lowrank_"):
        w.add_lowrank_(A, B, SCALE)
    torch.testing.assert_close(w.unpack(), weight + SCALE * (B @ A) * mask)


def test_the_default_configuration_serves_too() -> None:
    weight, mask, w = random_weight((19, 36), "bitmap", torch.float16)
    arguments = [normal(7, 36, dtype=torch.float16), normal(3, 36, seed=6), normal(19, 3, seed=7)]
    arguments.append(torch.zeros(19, device=DEVICE))
    with pk.backend("triton"):
        got = gradients(op("masked_lora_linear", w), arguments, normal(7, 19))
    exact = gradients(
        dense_op("masked_lora_linear", weight, mask), [a.double() for a in arguments], normal(7, 19).half()
    )
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens,N", [(0, 6), (4, 0)])
def test_no_tokens_and_no_outputs(layout: str, tokens: int, N: int) -> None:
    if N:
        _, _, w = random_weight((N, 20), layout)
    else:
        w = pk.pack(torch.empty(0, 20, device=DEVICE), torch.empty(0, 20, dtype=torch.bool, device=DEVICE), layout)
    arguments = [normal(tokens, 20), normal(3, 20), normal(N, 3), normal(N)]
    for how in ("masked_lora_linear", "scale_lora_linear"):
        with triton(how, f"{how}_backward"):
            y, dx, dA, dB, dbias = gradients(op(how, w), arguments, normal(tokens, N))
        assert y.shape == (tokens, N)
        for gradient, argument in zip((dx, dA, dB, dbias), arguments, strict=True):
            assert torch.equal(gradient, torch.zeros_like(argument))
    with triton("add_lowrank_", "mul_lowrank_"):
        w.add_lowrank_(*arguments[1:3], SCALE).mul_lowrank_(*arguments[1:3])
