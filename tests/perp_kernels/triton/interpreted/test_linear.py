"""Unpacking, merging and sparse_linear, in every layout, against float64."""

import pytest
import torch
from torch.nn import functional as F

import perp_kernels as pk
from tests.perp_kernels.oracles import LAYOUTS, assert_no_worse, gradients, normal, random_mask, random_weight

from .small import triton

DTYPES = [torch.float32, torch.float16]
SHAPES = [(1, 4), (34, 72)]


def rectangular(dtype: torch.dtype) -> tuple[torch.Tensor, pk.SparseWeight]:
    """A bitmap weight whose rows all keep 9 of 28."""
    mask = torch.rand(20, 28, generator=torch.Generator().manual_seed(3)).argsort(1) < 9
    weight = torch.where(mask, normal(20, 28), 0.0).to(dtype)
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
    weight, w = rectangular(torch.float32)
    with triton("unpack"):
        assert torch.equal(w.unpack(), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens,with_bias", [(0, True), (20, False), (65, True)])
def test_sparse_linear(layout: str, dtype: torch.dtype, tokens: int, with_bias: bool) -> None:
    weight, _, w = random_weight((19, 36), layout, dtype)
    x, bias = normal(tokens, 36, dtype=dtype), normal(19, seed=4) if with_bias else None
    with triton("sparse_linear"):
        y, again = pk.sparse_linear(x, w, bias), pk.sparse_linear(x, w, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain = F.linear(x.float(), weight.float(), bias).to(dtype)
    assert_no_worse(y, plain, exact, factor=3.0)
    assert torch.equal(y, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, "rectangular"])
def test_gradients_of_sparse_linear(layout: str, dtype: torch.dtype) -> None:
    if layout == "rectangular":
        weight, w = rectangular(dtype)
        mask = w.mask()
    else:
        weight, mask, w = random_weight((20, 28), layout, dtype)
    x, bias, grad_y = normal(2, 11, 28, dtype=dtype), normal(20, dtype=dtype), normal(2, 11, 20, dtype=dtype, seed=9)

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
    x, bias, offsets = normal(9, 20), normal(3, 6, seed=4), torch.tensor([2, 2, 9])
    with triton("sparse_linear"):
        y = pk.sparse_linear(x, w, bias, offsets)
    exact = torch.cat([F.linear(x[:2], weight[0], bias[0]), F.linear(x[2:], weight[2], bias[2])])
    torch.testing.assert_close(y, exact)


def test_nothing_kept_and_everything_kept() -> None:
    x = normal(3, 40)
    for mask in (torch.zeros(5, 40, dtype=torch.bool), torch.ones(5, 40, dtype=torch.bool)):
        weight = torch.where(mask, normal(5, 40, seed=1), 0.0)
        w = pk.pack(weight, mask, "bitmap")
        with triton("sparse_linear"):
            y = pk.sparse_linear(x, w)
        torch.testing.assert_close(y, x @ weight.t())


def test_inputs_with_strides() -> None:
    weight, _, w = random_weight((19, 36), "semi24")
    for x in (normal(4, 72)[:, ::2], normal(36, 4).t(), normal(1, 36).expand(4, 36)):
        with triton("sparse_linear"):
            y = pk.sparse_linear(x, w)
        torch.testing.assert_close(y, x @ weight.t())


def test_the_default_configuration_serves_too() -> None:
    weight, mask = normal(40, 200), random_mask((40, 200), "bitmap")
    w, x = pk.pack(weight, mask, "bitmap"), normal(17, 200)
    with pk.backend("triton"):
        torch.testing.assert_close(pk.sparse_linear(x, w), x @ torch.where(mask, weight, 0.0).t())
