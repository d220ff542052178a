import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perp_kernels import SparseWeight, masked_lora_linear, pack, scale_lora_linear
from perp_kernels.ops import _rows

from .oracles import LAYOUTS, normal, random_weight

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SCALE = 1.7


@pytest.fixture(params=[2 << 20, 1], ids=["one chunk", "chunks of 16 rows"], autouse=True)
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "_CHUNK_BYTES", request.param)


def adapter(shape: tuple[int, ...], r: int = 3) -> tuple[Tensor, Tensor]:
    *experts, N, K = shape
    return normal(*experts, r, K, seed=7) / K**0.5, normal(*experts, N, r, seed=8)


def assert_zeros_as_before(w: SparseWeight, mask: Tensor) -> None:
    assert torch.equal(w.mask(), mask)
    dense = w.unpack()
    assert dense.masked_fill(mask, 0).view(torch.uint8).eq(0).all(), "a pruned weight is not +0"
    SparseWeight.from_components(w.components(), w.shape, w.layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 4), (35, 20), (3, 18, 12)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_formed_in_fp32_and_rounded_once(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, mask, w = random_weight(shape, layout, dtype)
    A, B = adapter(shape)
    wide = torch.promote_types(dtype, torch.float32)
    exact = weight.double() + mask * (SCALE * (B.double() @ A.double()))
    address = w.values.data_ptr()
    assert w.add_lowrank_(A, B, SCALE) is w
    assert w.values.data_ptr() == address
    assert_zeros_as_before(w, mask)
    eps = torch.finfo(wide).eps
    # One rounding to the dtype of the values of a sum of 1 + r products in the wide one.
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 + 4 * eps * (exact.abs() + 1)
    assert ((w.unpack().double() - exact).abs() <= allowed).all()

    weight, mask, w = random_weight(shape, layout, dtype)
    exact = weight.double() * (B.double() @ A.double())
    assert w.mul_lowrank_(A, B) is w
    assert_zeros_as_before(w, mask)
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 + 4 * eps * weight.double().abs() * (B.abs() @ A.abs())
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((w.unpack().double() - exact).abs() <= allowed + tiny).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("experts", [None, 2])
def test_merged_layer_computes_what_the_adapter_did(layout: str, dtype: torch.dtype, experts: int | None) -> None:
    shape = (70, 24) if experts is None else (experts, 70, 24)
    offsets = None if experts is None else torch.tensor([4, 9])
    A, B = adapter(shape)
    x = torch.eye(24, dtype=dtype)[:9]
    _, _, w = random_weight(shape, layout, dtype)
    # A row of the identity reads one column of the effective weight, which must be the merged one to the bit.
    before = masked_lora_linear(x, w, A, B, SCALE, offsets=offsets)
    assert torch.equal(before, masked_lora_linear(x, w.add_lowrank_(A, B, SCALE), A, 0 * B, SCALE, offsets=offsets))
    _, _, w = random_weight(shape, layout, dtype)
    before = scale_lora_linear(x, w, A, B, offsets=offsets)
    assert torch.equal(before, masked_lora_linear(x, w.mul_lowrank_(A, B), A, 0 * B, SCALE, offsets=offsets))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_weight_that_becomes_zero_stays_kept(layout: str) -> None:
    weight = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]])
    mask = weight != 0
    w = pack(weight, mask, layout).add_lowrank_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(2, 1), -1.0)
    assert w.unpack().eq(0).all()
    assert torch.equal(w.mask(), mask)
    assert w.nnz == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bad_adapters_do_not_reach_pruned_weights(layout: str) -> None:
    _, mask, w = random_weight((6, 8), layout)
    w.add_lowrank_(torch.full((1, 8), torch.inf), torch.ones(6, 1), 1.0)
    assert_zeros_as_before(w, mask)
    assert w.unpack()[mask].isinf().all()


def test_parameters_are_merged_in_place_and_versions_move() -> None:
    weight, _, w = random_weight((6, 8), "dense")
    values = torch.nn.Parameter(w.values)
    module_weight = SparseWeight(values, w.index, None, w.shape, w.layout)
    A, B = (torch.nn.Parameter(t) for t in adapter((6, 8)))
    version = values._version
    module_weight.add_lowrank_(A, B, SCALE)
    assert values._version > version
    assert values.grad_fn is None
    torch.testing.assert_close(values.detach(), torch.where(w.mask(), weight + SCALE * (B @ A).detach(), 0))


def test_arrays_are_accepted_and_shapes_checked() -> None:
    weight, mask, w = random_weight((6, 8), "bitmap")
    A, B = adapter((6, 8))
    w.add_lowrank_(A.numpy(), B.numpy(), 2.0)
    torch.testing.assert_close(w.unpack(), weight + 2 * mask * (B @ A))
    with pytest.raises(ValueError, match=r"A \['r', 8\]"):
        w.add_lowrank_(A, B[:5], 2.0)
    with pytest.raises(ValueError, match=r"A \['r', 8\]"):
        w.mul_lowrank_(A[:1], B)
    torch.testing.assert_close(F.linear(normal(2, 8), w.unpack()), masked_lora_linear(normal(2, 8), w, A, 0 * B, 1.0))
