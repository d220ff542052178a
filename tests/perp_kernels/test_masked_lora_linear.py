import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perp_kernels import SparseWeight, masked_lora_linear, pack
from perp_kernels.ops import _rows

from .oracles import LAYOUTS, assert_no_worse, gradients, normal, random_weight

SIZES = [(1, 4, 1, 1), (7, 20, 9, 3), (33, 72, 70, 5)]
SCALE = 1.7


@pytest.fixture(params=[2 << 20, 1], ids=["one chunk", "chunks of 16 rows"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "_CHUNK_BYTES", request.param)


def published(x: Tensor, A: Tensor, B: Tensor, bias: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The definition, in the dtype of x but for the effective weight, which is formed in that of the adapters."""
    return F.linear(x, (weight + SCALE * (B @ A).masked_fill(~mask, 0)).to(x.dtype), bias.to(x.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter_in_fp32", [True, False], ids=["fp32 adapter", "same adapter"])
def test_error_against_float64(layout, size, dtype, adapter_in_fp32, chunked) -> None:
    T, K, N, r = size
    weight, mask, w = random_weight((N, K), layout, dtype)
    trained = torch.float32 if adapter_in_fp32 else dtype
    x, grad_y = normal(T, K, dtype=dtype), normal(T, N, dtype=dtype)
    A, B, bias = normal(r, K, dtype=trained) / K**0.5, normal(N, r, dtype=trained), normal(N, dtype=trained)
    got = gradients(lambda x, A, B, b: masked_lora_linear(x, w, A, B, SCALE, b), [x, A, B, bias], grad_y)
    plain = gradients(lambda *leaves: published(*leaves, weight, mask), [x, A, B, bias], grad_y)
    exact = gradients(
        lambda *leaves: published(*leaves, weight.double(), mask), [t.double() for t in (x, A, B, bias)], grad_y
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
    assert torch.autograd.gradcheck(lambda x, A, B, b: masked_lora_linear(x, w, A, B, SCALE, b, offsets), leaves)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_overflow_at_a_pruned_weight_stays_out(layout: str) -> None:
    weight, mask, w = random_weight((6, 8), layout)
    A, B = torch.eye(8), torch.where(mask, normal(6, 8), torch.finfo(torch.float32).max)
    A[0] *= 10
    y = masked_lora_linear(normal(5, 8), w, A, B, 1.0)
    torch.testing.assert_close(y, F.linear(normal(5, 8), weight + torch.where(mask, B @ A, 0)))
    row, column = (~mask).nonzero()[0].tolist()
    x, grad_y = torch.zeros(3, 8), torch.zeros(3, 6)
    x[0, column] = grad_y[0, row] = 1e30
    grads = gradients(lambda A, B: masked_lora_linear(x, w, A, B, 1.0), [normal(2, 8), normal(6, 2)], grad_y)[1:]
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_adapter_is_the_frozen_layer(layout: str) -> None:
    weight, _, w = random_weight((70, 24), layout)
    x = normal(5, 24)
    y = masked_lora_linear(x, w, normal(3, 24), torch.zeros(70, 3), SCALE)
    torch.testing.assert_close(y, F.linear(x, weight))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_and_strides(layout: str) -> None:
    _, _, w = random_weight((5, 8), layout)
    x, A, B = normal(4, 3, 8), normal(2, 8), normal(5, 2)
    expected = gradients(lambda *t: masked_lora_linear(t[0], w, *t[1:], SCALE), [x, A, B], torch.ones(4, 3, 5))
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1), A.t().contiguous().t(), B.t().contiguous().t()]
    leaves = [t.requires_grad_() for t in strided]
    y = masked_lora_linear(leaves[0], w, *leaves[1:], SCALE)
    # The gradient of a sum is an expanded scalar: all its strides are 0.
    for got, truth in zip([y, *torch.autograd.grad(y.sum(), leaves)], expected, strict=True):
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_it_returns_may_be_changed_in_place(layout: str) -> None:
    weight, mask, w = random_weight((5, 8), layout)
    x, A, B = normal(4, 3, 8).requires_grad_(), normal(2, 8), normal(5, 2)
    y = masked_lora_linear(x, w, A, B, SCALE)
    y += 1
    y.square().sum().backward()
    effective = weight + SCALE * (B @ A).masked_fill(~mask, 0)
    torch.testing.assert_close(x.grad, 2 * (F.linear(x.detach(), effective) + 1) @ effective)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty(layout: str) -> None:
    _, _, w = random_weight((5, 8), layout)
    y, dx, dA, dB = gradients(
        lambda x, A, B: masked_lora_linear(x, w, A, B, SCALE),
        [torch.empty(2, 0, 8), normal(3, 8), normal(5, 3)],
        torch.empty(2, 0, 5),
    )
    assert y.shape == (2, 0, 5)
    assert dx.shape == (2, 0, 8)
    assert dA.eq(0).all()
    assert dB.eq(0).all()
    no_rows = pack(torch.empty(0, 8), torch.empty(0, 8, dtype=torch.bool), layout)
    assert masked_lora_linear(normal(3, 8), no_rows, normal(2, 8), torch.empty(0, 2), 1.0).shape == (3, 0)


def test_only_what_is_asked_for() -> None:
    _, _, w = random_weight((20, 24), "bitmap")
    arguments = [normal(4, 24), normal(3, 24), normal(20, 3), normal(20)]
    grad_y = normal(4, 20)
    full = gradients(lambda x, A, B, b: masked_lora_linear(x, w, A, B, SCALE, b), arguments, grad_y)[1:]
    for position in range(4):
        leaves = [t.detach().clone().requires_grad_(i == position) for i, t in enumerate(arguments)]
        x, A, B, bias = leaves
        y = masked_lora_linear(x, w, A, B, SCALE, bias)
        keeps_x = y.grad_fn.saved_tensors[0] is not None
        assert keeps_x == (position in (1, 2))
        assert torch.equal(torch.autograd.grad(y, leaves[position], grad_y)[0], full[position])


def test_saves_nothing_of_its_own() -> None:
    _, _, w = random_weight((20, 24), "bitmap")
    x, A, B = normal(4, 24), normal(3, 24).requires_grad_(), normal(20, 3).requires_grad_()
    y = masked_lora_linear(x, w, A, B, SCALE)
    given = {t.data_ptr() for t in (x, A, B, *w.components().values())}
    assert {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None} <= given


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_separate_layers(layout: str) -> None:
    weight, mask, w = random_weight((3, 6, 8), layout)
    offsets, bounds = torch.tensor([4, 4, 7]), [(0, 4), (4, 4), (4, 7)]
    arguments, grad_y = [normal(7, 8), normal(3, 2, 8), normal(3, 6, 2), normal(3, 6)], normal(7, 6)
    y, dx, *rest = gradients(lambda x, A, B, b: masked_lora_linear(x, w, A, B, SCALE, b, offsets), arguments, grad_y)
    for expert, (begin, end) in enumerate(bounds):
        alone = pack(weight[expert], mask[expert], layout)
        x, A, B, bias = arguments
        got = gradients(
            lambda x, A, B, b, w=alone: masked_lora_linear(x, w, A, B, SCALE, b),
            [x[begin:end], A[expert], B[expert], bias[expert]],
            grad_y[begin:end],
        )
        torch.testing.assert_close([y[begin:end], dx[begin:end], *(t[expert] for t in rest)], got)


def test_repeats_bitwise() -> None:
    _, _, w = random_weight((70, 72), "dense")
    arguments, grad_y = [normal(33, 72), normal(5, 72), normal(70, 5)], normal(33, 70)
    first, second = (
        gradients(lambda x, A, B: masked_lora_linear(x, w, A, B, SCALE), arguments, grad_y) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_leaves_it_alone() -> None:
    _, _, w = random_weight((6, 8), "bitmap")
    arguments, grad_y = [normal(3, 8), normal(2, 8), normal(6, 2)], normal(3, 6)

    def run() -> list[Tensor]:
        return gradients(lambda x, A, B: masked_lora_linear(x, w, A, B, SCALE), arguments, grad_y)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run()
    assert all(torch.equal(a, b) for a, b in zip(inside, run(), strict=True))


def test_arrays_are_accepted() -> None:
    _, _, w = random_weight((6, 8), "bitmap")
    x, A, B = normal(3, 8), normal(2, 8), normal(6, 2)
    expected = masked_lora_linear(x, w, A, B, SCALE)
    assert torch.equal(masked_lora_linear(x.numpy(), w, A.numpy(), B.numpy(), SCALE), expected)


def test_bad_input() -> None:
    _, _, w = random_weight((6, 8), "dense")
    x = normal(3, 8)
    for A, B in [((2, 7), (6, 2)), ((2, 8), (6, 3)), ((2, 8), (5, 2)), ((8,), (6, 2)), ((1, 2, 8), (1, 6, 2))]:
        with pytest.raises(ValueError, match=r"A \['r', 8\] and B \[6, 'r'\]"):
            masked_lora_linear(x, w, normal(*A), normal(*B), 1.0)
    with pytest.raises(TypeError, match="cast one of them"):
        masked_lora_linear(x.bfloat16(), w, normal(2, 8), normal(6, 2), 1.0)
    half = SparseWeight(w.values.bfloat16(), w.index, None, w.shape, w.layout)
    assert masked_lora_linear(x.bfloat16(), half, normal(2, 8), normal(6, 2), 1.0).dtype == torch.bfloat16
