import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perp_kernels import pack, scale_lora_linear
from perp_kernels.ops import _rows

from .oracles import LAYOUTS, assert_no_worse, gradients, normal, random_weight

SIZES = [(1, 4, 1, 1), (7, 20, 9, 3), (33, 72, 70, 5)]


@pytest.fixture(params=[2 << 20, 1], ids=["one chunk", "chunks of 16 rows"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "_CHUNK_BYTES", request.param)


def definition(x: Tensor, A: Tensor, B: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """In the dtype of x but for the effective weight, which is formed in that of the adapters."""
    return F.linear(x, (weight * (B @ A)).to(x.dtype), bias.to(x.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_against_float64(layout: str, size: tuple[int, ...], dtype: torch.dtype, chunked: None) -> None:
    T, K, N, r = size
    weight, _, w = random_weight((N, K), layout, dtype)
    x, grad_y = normal(T, K, dtype=dtype), normal(T, N, dtype=dtype)
    A, B, bias = normal(r, K), normal(N, r), normal(N)
    got = gradients(lambda x, A, B, b: scale_lora_linear(x, w, A, B, b), [x, A, B, bias], grad_y)
    plain = gradients(lambda *leaves: definition(*leaves, weight), [x, A, B, bias], grad_y)
    exact = gradients(
        lambda *leaves: definition(*leaves, weight.double()), [t.double() for t in (x, A, B, bias)], grad_y
    )
    for mine, theirs, truth in zip(got, plain, exact, strict=True):
        assert_no_worse(mine, theirs, truth, factor=3.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("experts", [None, 3])
def test_gradcheck(layout: str, experts: int | None) -> None:
    leading = () if experts is None else (experts,)
    _, _, w = random_weight((*leading, 6, 12), layout, torch.float64)
    offsets = None if experts is None else torch.tensor([2, 2, 5])
    shapes = [(5, 12), (*leading, 3, 12), (*leading, 6, 3), (*leading, 6)]
    leaves = [normal(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda x, A, B, b: scale_lora_linear(x, w, A, B, b, offsets), leaves)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_identity_start_is_the_frozen_layer(layout: str) -> None:
    weight, _, w = random_weight((70, 24), layout)
    x, r = normal(5, 24), 4
    y = scale_lora_linear(x, w, torch.full((r, 24), r**-0.5), torch.full((70, r), r**-0.5))
    torch.testing.assert_close(y, F.linear(x, weight))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_and_strides(layout: str) -> None:
    weight, mask, w = random_weight((3, 6, 8), layout)
    offsets = torch.tensor([4, 4, 7])
    x, A, B = normal(8, 7).t(), normal(3, 8, 2).transpose(1, 2), normal(3, 2, 6).transpose(1, 2)
    y = scale_lora_linear(x, w, A, B, offsets=offsets)
    for expert, (begin, end) in enumerate([(0, 4), (4, 4), (4, 7)]):
        alone = pack(weight[expert], mask[expert], layout)
        torch.testing.assert_close(y[begin:end], scale_lora_linear(x[begin:end], alone, A[expert], B[expert]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_infinite_product_stays_out_of_pruned_weights(layout: str) -> None:
    weight, mask, w = random_weight((6, 8), layout)
    A, B = torch.eye(8), torch.where(mask, normal(6, 8), torch.finfo(torch.float32).max)
    A[0] *= 10
    y = scale_lora_linear(normal(3, 8), w, A, B)
    torch.testing.assert_close(y, F.linear(normal(3, 8), weight * torch.where(mask, B @ A, 0)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_overflow_at_a_pruned_weight_stays_out_of_the_gradients(layout: str) -> None:
    _, mask, w = random_weight((6, 8), layout)
    row, column = (~mask).nonzero()[0].tolist()
    x, grad_y = torch.zeros(3, 8), torch.zeros(3, 6)
    x[0, column] = grad_y[0, row] = 1e30
    grads = gradients(lambda A, B: scale_lora_linear(x, w, A, B), [normal(2, 8), normal(6, 2)], grad_y)[1:]
    assert all(grad.isfinite().all() for grad in grads)


def test_only_what_is_asked_for() -> None:
    _, _, w = random_weight((20, 24), "bitmap")
    arguments, grad_y = [normal(4, 24), normal(3, 24), normal(20, 3), normal(20)], normal(4, 20)
    full = gradients(lambda x, A, B, b: scale_lora_linear(x, w, A, B, b), arguments, grad_y)[1:]
    for position in range(4):
        x, A, B, bias = leaves = [t.clone().requires_grad_(i == position) for i, t in enumerate(arguments)]
        y = scale_lora_linear(x, w, A, B, bias)
        assert (y.grad_fn.saved_tensors[0] is not None) == (position in (1, 2))
        assert torch.equal(torch.autograd.grad(y, leaves[position], grad_y)[0], full[position])


def test_empty() -> None:
    _, _, w = random_weight((5, 8), "bitmap")
    y, dx, dA, dB = gradients(
        lambda x, A, B: scale_lora_linear(x, w, A, B),
        [torch.empty(2, 0, 8), normal(3, 8), normal(5, 3)],
        torch.empty(2, 0, 5),
    )
    assert (y.shape, dx.shape) == ((2, 0, 5), (2, 0, 8))
    assert dA.eq(0).all()
    assert dB.eq(0).all()


def test_bad_input() -> None:
    _, _, w = random_weight((6, 8), "dense")
    with pytest.raises(ValueError, match=r"A \['r', 8\] and B \[6, 'r'\]"):
        scale_lora_linear(normal(3, 8), w, normal(2, 8), normal(5, 2))
