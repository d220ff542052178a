from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perp_kernels import SparseWeight, backend, pack, sparse_linear
from perp_kernels.ops import _rows

from .oracles import LAYOUTS, assert_no_worse, gradients, normal, random_weight

SIZES = [(1, 4, 1), (7, 20, 9), (33, 72, 70)]


@pytest.fixture(params=["preferred", "reference", "reference in chunks of 16 rows"])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "preferred":
        yield
    else:
        if "chunks" in request.param:
            monkeypatch.setattr(_rows, "_CHUNK_BYTES", 1)
        with backend("reference"):
            yield


def with_values(w: SparseWeight, values: Tensor) -> SparseWeight:
    return SparseWeight(values, w.index, w.row_ptr, w.shape, w.layout)


def stored(dense: Tensor, w: SparseWeight) -> Tensor:
    """`dense` in the places and the order of w.values."""
    dense = dense.masked_fill(~w.mask(), 0)
    return dense.view(w.values.shape) if w.layout == "dense" else dense[w.mask()].view(w.values.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32], ids=["bias", "bias in fp32"])
def test_error_against_float64(layout, size, dtype, bias_dtype, served) -> None:
    T, K, N = size
    weight, _, w = random_weight((N, K), layout, dtype)
    x, bias, grad_y = normal(T, K, dtype=dtype), normal(N, dtype=bias_dtype or dtype), normal(T, N, dtype=dtype)
    got = gradients(lambda x, v, b: sparse_linear(x, with_values(w, v), b), [x, w.values, bias], grad_y)
    plain = gradients(F.linear, [x, weight, bias.to(dtype)], grad_y)
    plain[3] = plain[3].to(bias.dtype)
    exact = gradients(F.linear, [t.double() for t in (x, weight, bias)], grad_y)
    plain[2], exact[2] = stored(plain[2], w), stored(exact[2], w)
    for mine, theirs, truth in zip(got, plain, exact, strict=True):
        assert_no_worse(mine, theirs, truth, factor=3.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("experts", [None, 3])
def test_gradcheck(layout: str, experts: int | None) -> None:
    shape = (6, 12) if experts is None else (experts, 6, 12)
    _, mask, w = random_weight(shape, layout, torch.float64)
    offsets = None if experts is None else torch.tensor([2, 2, 5])
    inputs = [normal(5, 12, dtype=torch.float64), normal(*shape[:-1], dtype=torch.float64), w.values.clone()]

    def layer(x: Tensor, bias: Tensor, values: Tensor) -> Tensor:
        # In the layout dense a pruned element of values is not an input, so the perturbation must not reach it.
        values = values * mask.view(values.shape) if layout == "dense" else values
        return sparse_linear(x, with_values(w, values), bias, offsets)

    assert torch.autograd.gradcheck(layer, [leaf.requires_grad_() for leaf in inputs])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_values_is_zero_where_pruned(layout: str) -> None:
    _, mask, w = random_weight((9, 12), layout)
    w.values.requires_grad_()
    x = normal(5, 12)
    x[2, 3] = torch.inf
    sparse_linear(x, w).sum().backward()
    assert w.values.grad is not None
    if layout == "dense":
        assert w.values.grad[~mask].view(torch.int32).eq(0).all()
        assert not w.values.grad[mask].eq(0).all()
    else:
        assert w.values.grad.numel() == mask.sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_and_strides_of_x(layout: str) -> None:
    weight, _, w = random_weight((5, 8), layout)
    x = normal(4, 3, 8)
    expected = F.linear(x, weight)
    torch.testing.assert_close(sparse_linear(x, w), expected)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    torch.testing.assert_close(sparse_linear(strided, w), expected)
    sparse_linear(strided, w).sum().backward()
    torch.testing.assert_close(strided.grad, weight.sum(0).expand(4, 3, 8))
    assert torch.equal(sparse_linear(x[1, 1], w), sparse_linear(x[1:2, 1], w)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_it_returns_may_be_changed_in_place(layout: str, served: None) -> None:
    weight, _, w = random_weight((5, 8), layout)
    x = normal(4, 3, 8).requires_grad_()
    y = sparse_linear(x, w)
    y += 1
    y.square().sum().backward()
    expected = 2 * (F.linear(x.detach(), weight) + 1) @ weight
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty(layout: str) -> None:
    _, _, w = random_weight((5, 8), layout)
    y, dx, dvalues = gradients(
        lambda x, v: sparse_linear(x, with_values(w, v)), [torch.empty(2, 0, 8), w.values], torch.empty(2, 0, 5)
    )
    assert y.shape == (2, 0, 5)
    assert dx.shape == (2, 0, 8)
    assert dvalues.eq(0).all()
    no_rows = pack(torch.empty(0, 8), torch.empty(0, 8, dtype=torch.bool), layout)
    assert sparse_linear(normal(3, 8), no_rows).shape == (3, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_what_is_asked_for(layout: str) -> None:
    _, _, w = random_weight((5, 8), layout)
    x, bias = normal(4, 8), normal(5)
    y = sparse_linear(x.requires_grad_(), w, bias)
    assert y.grad_fn.saved_tensors[0] is None, "x is kept alive though the weight is frozen"
    full = gradients(lambda x, v, b: sparse_linear(x, with_values(w, v), b), [x, w.values, bias], torch.ones(4, 5))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], full[1])
    values = w.values.clone().requires_grad_()
    y = sparse_linear(x.detach(), with_values(w, values))
    assert torch.equal(torch.autograd.grad(y.sum(), values)[0], full[2])
    y = sparse_linear(x.detach(), w, bias.requires_grad_())
    assert torch.equal(torch.autograd.grad(y.sum(), bias)[0], full[3])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_separate_layers(layout: str) -> None:
    weight, mask, w = random_weight((3, 6, 8), layout)
    x, bias, offsets = normal(7, 8), normal(3, 6), torch.tensor([4, 4, 7])
    y = sparse_linear(x, w, bias, offsets)
    for expert, (begin, end) in enumerate([(0, 4), (4, 4), (4, 7)]):
        alone = pack(weight[expert], mask[expert], layout)
        torch.testing.assert_close(y[begin:end], sparse_linear(x[begin:end], alone, bias[expert]))
    for bad in ([4, 4, 6], [5, 4, 7], [-1, 4, 7]):
        with pytest.raises(ValueError, match="rise to the number of tokens, 7"):
            sparse_linear(x, w, bias, torch.tensor(bad))


def test_repeats_bitwise() -> None:
    _, _, w = random_weight((70, 72), "bitmap")
    arguments, grad_y = [normal(33, 72), w.values], normal(33, 70)
    first, second = (gradients(lambda x, v: sparse_linear(x, with_values(w, v)), arguments, grad_y) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_leaves_it_alone() -> None:
    _, _, w = random_weight((6, 8), "bitmap")
    x = normal(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_linear(x, w)
    assert torch.equal(y, sparse_linear(x, w))


def test_arrays_are_accepted() -> None:
    _, _, w = random_weight((6, 8), "bitmap")
    x, bias = normal(3, 8), normal(6)
    assert torch.equal(sparse_linear(x.numpy(), w, bias.numpy()), sparse_linear(x, w, bias))


def test_bad_input() -> None:
    _, _, w = random_weight((6, 8), "dense")
    _, _, experts = random_weight((2, 6, 8), "dense")
    with pytest.raises(TypeError, match=r"x is torch\.float64 but the weight's values are torch\.float32"):
        sparse_linear(normal(3, 8, dtype=torch.float64), w)
    with pytest.raises(ValueError, match="weight has 8 inputs"):
        sparse_linear(normal(3, 7), w)
    with pytest.raises(ValueError, match=r"bias of a weight \[6, 8\] is \[6\]"):
        sparse_linear(normal(3, 8), w, normal(8))
    with pytest.raises(ValueError, match="takes no offsets"):
        sparse_linear(normal(3, 8), w, offsets=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"takes x \[T, K\] sorted by expert"):
        sparse_linear(normal(3, 8), experts)
    with pytest.raises(ValueError, match=r"takes x \[T, K\] sorted by expert"):
        sparse_linear(normal(1, 3, 8), experts, offsets=torch.tensor([1, 3]))
