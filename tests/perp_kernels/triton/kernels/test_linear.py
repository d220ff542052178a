"""Unpacking, merging and sparse_linear, in every layout, against float64."""

import pytest
import torch
from torch.nn import functional as F

import perp_kernels as pk
from tests.perp_kernels.oracles import DEVICE, LAYOUTS, assert_no_worse, gradients, normal, random_mask, random_weight

from .small import DTYPES, INTERPRETED, LAUNCHED, SCALES, triton

SHAPES = [(1, 4), *((34 * scale, 72 * scale) for scale in SCALES)]
# On either side of what is multiplied as it is stored, and of a tile of tokens.
TOKENS = (
    [(0, True), (1, False), (20, False), (65, True)]
    if INTERPRETED
    else [(0, True), (1, True), (3, False), *((tokens, tokens % 2 == 0) for tokens in (16, 17, 64, 65, 300))]
)


def rectangular(dtype: torch.dtype, scale: int) -> tuple[torch.Tensor, pk.SparseWeight]:
    """A bitmap weight whose rows all keep 9 of each 28."""
    N, K = 20 * scale, 28 * scale
    mask = normal(N, K, seed=3).argsort(1) < 9 * scale
    weight = torch.where(mask, normal(N, K), 0.0).to(dtype)
    w = pk.pack(weight, mask, "bitmap")
    assert w.row_ptr is None
    return weight, w


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5, 12)])
def test_unpack_gives_the_bits_back(layout: str, shape: tuple[int, ...]) -> None:
    weight, mask, w = random_weight(shape, layout, torch.float16)
    w.values.view(-1)[::5] = -0.0
    if layout == "dense":
        w.values[~mask.view(w.values.shape)] = 0.0
    with triton("unpack"):
        got = w.unpack()
    assert torch.equal(got.view(torch.int16), w.unpack().view(torch.int16))
    assert got.shape == weight.shape


def test_unpack_rows_of_equal_count() -> None:
    weight, w = rectangular(torch.float32, SCALES[0])
    with triton("unpack"):
        assert torch.equal(w.unpack(), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("tokens,with_bias", TOKENS)
def test_sparse_linear(layout: str, dtype: torch.dtype, scale: int, tokens: int, with_bias: bool) -> None:
    N, K = 19 * scale, 4 * 36 * scale if LAUNCHED else 36
    weight, _, w = random_weight((N, K), layout, dtype)
    x, bias = normal(tokens, K, dtype=dtype), normal(N, seed=4) if with_bias else None
    with triton("sparse_linear"):
        y, again = pk.sparse_linear(x, w, bias), pk.sparse_linear(x, w, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain = F.linear(x.float(), weight.float(), bias).to(dtype)
    assert_no_worse(y, plain, exact, factor=3.0)
    assert torch.equal(y, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("layout", [*LAYOUTS, "rectangular"])
def test_gradients_of_sparse_linear(layout: str, scale: int, dtype: torch.dtype) -> None:
    N, K, T = 20 * scale, 28 * scale, 11 * scale
    if layout == "rectangular":
        weight, w = rectangular(dtype, scale)
        mask = w.mask()
    else:
        weight, mask, w = random_weight((N, K), layout, dtype)
    x, bias, grad_y = normal(2, T, K, dtype=dtype), normal(N, dtype=dtype), normal(2, T, N, dtype=dtype, seed=9)

    def sparse(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return pk.sparse_linear(x, pk.SparseWeight(values, w.index, w.row_ptr, w.shape, w.layout), bias)

    with triton("sparse_linear", "sparse_linear_backward"):
        got = gradients(sparse, [x, w.values, bias], grad_y)
    plain = gradients(F.linear, [x, weight, bias], grad_y)
    exact = gradients(F.linear, [x.double(), weight.double(), bias.double()], grad_y)
    for g, p, e, of_values in zip(got, plain, exact, (False, False, True, False), strict=True):
        if of_values and w.layout == "dense":
            p, e = p * mask, e * mask
        elif of_values:
            p, e = p[mask].view(g.shape), e[mask].view(g.shape)
        assert_no_worse(g, p, e, factor=3.0)


def test_experts() -> None:
    weight, _, w = random_weight((3, 6, 20), "bitmap")
    x, bias, offsets = normal(9, 20), normal(3, 6, seed=4), torch.tensor([2, 2, 9], device=DEVICE)
    with triton("sparse_linear"):
        y = pk.sparse_linear(x, w, bias, offsets)
    exact = torch.cat([F.linear(x[:2], weight[0], bias[0]), F.linear(x[2:], weight[2], bias[2])])
    torch.testing.assert_close(y, exact)


def test_what_it_returns_may_be_changed_in_place() -> None:
    weight, _, w = random_weight((19, 36), "bitmap")
    x = normal(2, 3, 36).requires_grad_()
    with triton("sparse_linear", "sparse_linear_backward"):
        y = pk.sparse_linear(x, w)
        y += 1
        y.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * (F.linear(x.detach(), weight) + 1) @ weight)


def test_nothing_kept_and_everything_kept() -> None:
    x = normal(3, 40)
    for fill in (False, True):
        mask = torch.full((5, 40), fill, device=DEVICE)
        weight = torch.where(mask, normal(5, 40, seed=1), 0.0)
        w = pk.pack(weight, mask, "bitmap")
        with triton("sparse_linear"):
            y = pk.sparse_linear(x, w)
        torch.testing.assert_close(y, x @ weight.t())


def test_inputs_with_strides() -> None:
    weight, _, w = random_weight((19, 36), "semi24")
    for x in (normal(4, 72)[:, ::2], normal(36, 4).t(), normal(1, 36).expand(4, 36), normal(1, 72)[:, ::2]):
        with triton("sparse_linear"):
            y = pk.sparse_linear(x, w)
        torch.testing.assert_close(y, x @ weight.t())


def test_the_default_configuration_serves_too() -> None:
    weight, mask = normal(40, 200), random_mask((40, 200), "bitmap")
    w, x = pk.pack(weight, mask, "bitmap"), normal(17, 200)
    with pk.backend("triton"):
        torch.testing.assert_close(pk.sparse_linear(x, w), x @ torch.where(mask, weight, 0.0).t())
