import math

import numpy as np
import pytest
import torch
from torch import Tensor

import perp_kernels as pk
from perp_kernels import SparseWeight, pack, pack_bits, unpack_bits

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = ["reference", None]


def bits_of(x: Tensor) -> Tensor:
    """The bit pattern of x, which tells -0 from 0 and one NaN from another."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def make(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A weight with kept zeros of both signs and pruned NaN and inf, and a mask that the layout can hold."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if layout == "semi24":
        mask = pk.select(torch.rand(shape, generator=generator), "2:4")
    else:
        mask = torch.rand(shape, generator=generator) < 0.5
    flat, kept = weight.view(-1), mask.reshape(-1).nonzero().view(-1)
    flat[kept[::5]] = 0.0
    flat[kept[1::5]] = -0.0
    dropped = (~mask).reshape(-1).nonzero().view(-1)
    flat[dropped[::3]] = math.nan
    flat[dropped[1::3]] = -math.inf
    return weight.to(dtype), mask


def dense_of(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))


@pytest.fixture(params=BACKENDS, ids=lambda name: name or "preferred")
def each_backend(request: pytest.FixtureRequest):
    if request.param is None:
        yield
    else:
        with pk.backend(request.param):
            yield


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (4, 64), (2, 3, 17), (0, 9), (3, 0)], ids=str)
def test_bits_match_numpy(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = pack_bits(mask)
    assert torch.equal(bits, torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little")))
    assert torch.equal(pack_bits(mask.numpy()), bits)
    assert torch.equal(unpack_bits(bits, shape[-1]), mask)


def test_bits_of_every_byte() -> None:
    columns = torch.arange(8)
    mask = (torch.arange(256)[:, None] >> columns & 1).bool()
    assert torch.equal(pack_bits(mask).view(-1), torch.arange(256, dtype=torch.uint8))


def test_bits_refuse_what_is_no_mask() -> None:
    with pytest.raises(TypeError, match="bool"):
        pack_bits(torch.ones(3))
    with pytest.raises(ValueError, match=r"\[\.\.\., 2\]"):
        unpack_bits(torch.zeros(3, 1, dtype=torch.uint8), 9)


SHAPES = {
    "dense": [(1, 1), (5, 13), (7, 64), (3, 5, 11), (0, 8)],
    "bitmap": [(1, 1), (5, 13), (7, 64), (3, 5, 11), (0, 8)],
    "semi24": [(1, 4), (5, 12), (7, 64), (3, 5, 20), (0, 8)],
}
CASES = [(layout, shape) for layout in SHAPES for shape in SHAPES[layout]]


@pytest.mark.parametrize("layout,shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_keeps_every_bit(layout: str, shape: tuple[int, ...], dtype: torch.dtype, each_backend: None) -> None:
    weight, mask = make(shape, layout, dtype)
    packed = pack(weight, mask, layout)
    assert torch.equal(packed.mask(), mask)
    assert torch.equal(bits_of(packed.unpack()), bits_of(dense_of(weight, mask)))
    assert packed.nnz == int(mask.sum())
    assert (packed.shape, packed.dtype, packed.layout) == (shape, dtype, layout)
    again = SparseWeight.from_components(packed.components(), shape, layout)
    assert torch.equal(bits_of(again.unpack()), bits_of(packed.unpack()))


@pytest.mark.parametrize("layout", ["dense", "bitmap", "semi24"])
def test_backends_give_the_same_components(layout: str) -> None:
    weight, mask = make((6, 44), layout)
    with pk.backend("reference"):
        expected = pack(weight, mask, layout).components()
    got = pack(weight, mask, layout).components()
    assert got.keys() == expected.keys()
    for name, component in expected.items():
        assert component.dtype == got[name].dtype
        assert component.shape == got[name].shape
        assert component.numpy().tobytes() == got[name].numpy().tobytes()


def test_bitmap_is_the_documented_form(each_backend: None) -> None:
    weight = torch.arange(1.0, 21.0).view(2, 10)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, [0, 3, 9]] = True
    mask[1, [1, 2, 8]] = True
    equal = pack(weight, mask, "bitmap")
    assert equal.values.tolist() == [[1, 4, 10], [12, 13, 19]]
    assert equal.index.tolist() == [[0b00001001, 0b10], [0b00000110, 0b01]]
    assert equal.row_ptr is None
    mask[1] = False
    unequal = pack(weight, mask, "bitmap")
    assert unequal.values.tolist() == [1, 4, 10]
    assert unequal.row_ptr is not None
    assert unequal.row_ptr.tolist() == [0, 3, 3]
    assert list(unequal.components()) == ["values", "index", "row_ptr"]


def test_semi24_is_the_documented_form(each_backend: None) -> None:
    weight = torch.arange(12.0).view(1, 12)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, [0, 3, 5, 6, 10, 11]] = True
    packed = pack(weight, mask, "semi24")
    assert packed.values.tolist() == [[0, 3, 5, 6, 10, 11]]
    low, high, last = 0 | 3 << 2, 1 | 2 << 2, 2 | 3 << 2
    assert packed.index.tolist() == [[low | high << 4, last]]


def test_dense_is_the_documented_form(each_backend: None) -> None:
    packed = pack(torch.tensor([[-1.0, 2.0, -3.0]]), torch.tensor([[False, True, False]]), "dense")
    assert bits_of(packed.values).tolist() == bits_of(torch.tensor([[0.0, 2.0, 0.0]])).tolist()
    assert packed.index.tolist() == [[2]]


def test_bytes_and_nothing_shared_with_the_source() -> None:
    weight, mask = make((8, 64), "semi24")
    weight = dense_of(weight, mask)
    assert pack(weight, mask, "bitmap").nbytes == 8 * 32 * 4 + 8 * 8
    assert pack(weight, mask, "semi24").nbytes == 8 * 32 * 4 + 8 * 8
    packed = pack(weight, mask, "dense")
    assert packed.nbytes == 8 * 64 * 4 + 8 * 8
    before = packed.unpack()
    weight.zero_()
    assert torch.equal(packed.unpack(), before)
    packed.unpack().fill_(7.0)
    assert torch.equal(packed.unpack(), before)


def test_to_moves_and_casts() -> None:
    weight, mask = make((4, 16), "bitmap")
    packed = pack(weight, mask, "bitmap").to(dtype=torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    assert torch.equal(packed.unpack(), dense_of(weight, mask).bfloat16())
    on_meta = packed.to("meta")
    assert {component.device.type for component in on_meta.components().values()} == {"meta"}


@pytest.mark.parametrize("keep", [1, 3])
def test_semi24_refuses_other_counts_and_names_bitmap(keep: int) -> None:
    mask = torch.tensor([[True, True, False, False]] * 4).view(2, 8).clone()
    mask[1, 4:] = torch.arange(4) < keep
    with pytest.raises(ValueError, match=f'row 1 keeps {keep} of inputs 4 to 7: use layout "bitmap"'):
        pack(torch.rand(2, 8), mask, "semi24")


def test_semi24_counts_a_kept_zero() -> None:
    mask = torch.tensor([[True, True, False, False]])
    packed = pack(torch.tensor([[0.0, -0.0, 5.0, 6.0]]), mask, "semi24")
    assert packed.nnz == 2
    assert torch.equal(packed.mask(), mask)


def test_pack_refuses_bad_input() -> None:
    weight, mask = torch.rand(4, 8), torch.ones(4, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match='no layout "csr"'):
        pack(weight, mask, "csr")
    with pytest.raises(TypeError, match="int64"):
        pack(torch.ones(4, 8, dtype=torch.int64), mask)
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        pack(weight[0], mask[0])
    with pytest.raises(ValueError, match="at least 1"):
        pack(weight[:, :0], mask[:, :0])
    with pytest.raises(ValueError, match="bool"):
        pack(weight, mask.float())
    with pytest.raises(ValueError, match="bool"):
        pack(weight, mask[:2])
    with pytest.raises(ValueError, match="multiple of 4"):
        pack(torch.rand(4, 6), torch.ones(4, 6, dtype=torch.bool), "semi24")


def test_arrays_are_accepted() -> None:
    weight, mask = make((3, 10), "bitmap")
    packed = pack(weight.numpy(), mask.numpy())
    assert torch.equal(bits_of(packed.unpack()), bits_of(dense_of(weight, mask)))


CORRUPTIONS = {
    "padding": ("bitmap", "index", lambda t: t.index_fill(1, torch.tensor([1]), 255), "past the last column"),
    "count": ("bitmap", "values", lambda t: t[:, :-1], "as many columns"),
    "flat": ("bitmap", "values", lambda t: t.reshape(-1), "without row_ptr"),
    "nibble": ("semi24", "index", lambda t: t.index_fill(0, torch.tensor([0]), 0), "rising order"),
    "last nibble": (
        "semi24",
        "index",
        lambda t: t + torch.tensor([0, 16], dtype=torch.uint8),
        "nibbles past the last column",
    ),
    "dense": ("dense", "values", lambda t: t + 1, "0 where pruned"),
    "width": ("dense", "index", lambda t: t[:, :1], "uint8"),
    "integer": ("dense", "values", lambda t: t.int(), "floating point"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_from_components_finds_corruption(name: str) -> None:
    layout, part, corrupt, rule = CORRUPTIONS[name]
    weight, _ = make((4, 12), "semi24")
    mask = pk.select(torch.rand(4, 12), "2:4")
    components = pack(weight, mask, layout).components()
    components[part] = corrupt(components[part])
    with pytest.raises(ValueError, match=rule):
        SparseWeight.from_components(components, (4, 12), layout)
    SparseWeight.from_components(components, (4, 12), layout, validate=False)


def test_from_components_checks_row_ptr() -> None:
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 2:] = False
    components = pack(torch.rand(3, 8), mask).components()
    components["row_ptr"] = components["row_ptr"] + 1
    with pytest.raises(ValueError, match="row_ptr sums"):
        SparseWeight.from_components(components, (3, 8), "bitmap")
    with pytest.raises(ValueError, match="values, index"):
        SparseWeight.from_components({"values": torch.rand(3)}, (3, 8), "bitmap")
