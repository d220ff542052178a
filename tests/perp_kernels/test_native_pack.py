"""Pack and unpack of the native extension, against the layouts' definitions, on every code path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from perp_kernels.cpu import native
from perp_kernels.cpu.pack import ELEMENTS, pack, unpack

from .native import PATHS, bits_of, force, needs_native, nm_mask, random_mask, random_weight, same_bits

pytestmark = needs_native
SHAPES = [(1, 1), (3, 7), (5, 8), (4, 31), (2, 33), (7, 64), (3, 100), (40, 515), (0, 16), (4, 0)]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from force(request.param)


def kept_values(weight: Tensor, mask: Tensor) -> list[Tensor]:
    return [weight[r][mask[r]] for r in range(len(weight))]


def dense_of(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitmap_holds_the_kept_values_in_column_order(path: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for kept in (0.0, 0.5, 0.9, 1.0):
        check_bitmap(random_weight(*shape, dtype), random_mask(*shape, kept))


def check_bitmap(weight: Tensor, mask: Tensor) -> None:
    values, index, row_ptr = pack(weight, bits_of(mask), "bitmap")
    rows = kept_values(weight, mask)
    assert torch.equal(index, bits_of(mask))
    assert same_bits(values.flatten(), torch.cat(rows) if rows else values.flatten())
    counts = mask.sum(1)
    if len(counts.unique()) <= 1:
        assert row_ptr is None
        assert values.shape == (len(mask), int(counts[0]) if len(mask) else 0)
    else:
        assert row_ptr is not None
        assert row_ptr.tolist() == [0, *counts.cumsum(0).tolist()]
    assert same_bits(unpack(values, index, row_ptr, mask.shape[1], "bitmap"), dense_of(weight, mask))


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (3, 8), (2, 12), (5, 36), (3, 64), (33, 516), (0, 8), (3, 0)], ids=str)
def test_semi24_holds_two_of_four_and_their_positions(path: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, mask = random_weight(*shape, dtype), nm_mask(*shape)
    values, index, row_ptr = pack(weight, bits_of(mask), "semi24")
    assert row_ptr is None
    assert values.shape == (shape[0], shape[1] // 2)
    expected = torch.zeros(shape[0], (shape[1] + 7) // 8, dtype=torch.uint8)
    for r in range(shape[0]):
        for group in range(shape[1] // 4):
            first, second = mask[r, 4 * group : 4 * group + 4].nonzero().flatten().tolist()
            expected[r, group // 2] |= (first | second << 2) << (4 * (group % 2))
    assert torch.equal(index, expected)
    assert same_bits(values, weight[mask].reshape(values.shape))
    assert same_bits(unpack(values, index, None, shape[1], "semi24"), dense_of(weight, mask))


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_puts_positive_zero_where_pruned(path: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, mask = random_weight(*shape, dtype), random_mask(*shape, 0.5)
    weight[~mask] = float("nan")
    values, index, row_ptr = pack(weight, bits_of(mask), "dense")
    assert row_ptr is None
    assert torch.equal(index, bits_of(mask))
    assert same_bits(values, dense_of(weight, mask))
    assert same_bits(unpack(values, index, None, shape[1], "dense"), values)


def test_strided_rows_and_transposed_weights_are_read_in_place_or_copied(path: str) -> None:
    base = random_weight(64, 200, torch.bfloat16)
    mask = random_mask(64, 100, 0.5)
    one = random_weight(1, 100, torch.bfloat16).expand(64, 100)
    for weight in (base[:, 37:137], random_weight(100, 64, torch.bfloat16).t(), one):
        values, index, row_ptr = pack(weight, bits_of(mask), "bitmap")
        assert same_bits(values, weight[mask])
        assert same_bits(unpack(values, index, row_ptr, 100, "bitmap"), dense_of(weight, mask))


def test_nan_payloads_survive(path: str) -> None:
    weight = torch.arange(0x7F81, 0x7F81 + 64, dtype=torch.int16).view(torch.bfloat16).reshape(2, 32)
    mask = random_mask(2, 32, 0.5)
    values, index, row_ptr = pack(weight, bits_of(mask), "bitmap")
    assert same_bits(values, weight[mask])
    assert same_bits(unpack(values, index, row_ptr, 32, "bitmap"), dense_of(weight, mask))


@pytest.mark.parametrize("kept", [1, 3])
def test_semi24_refuses_other_counts_and_names_bitmap(path: str, kept: int) -> None:
    mask = nm_mask(6, 16)
    mask[4, 8:12] = torch.arange(4) < kept
    with pytest.raises(ValueError, match=r"row 4 .*bitmap"):
        pack(random_weight(6, 16, torch.float32), bits_of(mask), "semi24")


def test_semi24_refuses_columns_that_are_no_multiple_of_four(path: str) -> None:
    with pytest.raises(ValueError, match="multiple of 4 columns, got 6"):
        pack(random_weight(2, 6, torch.float32), bits_of(random_mask(2, 6, 0.5)), "semi24")


def test_contradictory_components_are_refused(path: str) -> None:
    weight, mask = random_weight(9, 40, torch.float32), random_mask(9, 40, 0.5)
    bits = bits_of(mask)
    values, index, row_ptr = pack(weight, bits, "bitmap")
    assert row_ptr is not None
    flipped = index.clone()
    flipped[3, 2] ^= 1
    with pytest.raises(ValueError, match="row 3 of index"):
        unpack(values, flipped, row_ptr, 40, "bitmap")
    with pytest.raises(ValueError, match="row_ptr must run from 0"):
        unpack(values[:-1], index, row_ptr, 40, "bitmap")
    for wrong in (torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min, -1):
        corrupt = row_ptr.clone()
        corrupt[5] = wrong
        with pytest.raises(ValueError, match="row 4 of index"):
            unpack(values, index, corrupt, 40, "bitmap")
    with pytest.raises(ValueError, match=r"index has shape \[9, 5\], expected \[9, 6\]"):
        unpack(values, index, row_ptr, 41, "bitmap")
    with pytest.raises(ValueError, match="index is int64, expected uint8"):
        unpack(values, index.long(), row_ptr, 40, "bitmap")
    with pytest.raises(ValueError, match="no pair of ascending positions"):
        unpack(values[:180].view(9, 20), torch.zeros(9, 5, dtype=torch.uint8), None, 40, "semi24")


def test_padding_bits_are_refused(path: str) -> None:
    weight = random_weight(3, 12, torch.float32)
    bits = bits_of(random_mask(3, 12, 0.5))
    bits[1, 1] |= 0x10
    for layout in ("bitmap", "dense"):
        with pytest.raises(ValueError, match="row 1 of index has a bit set beyond column 12"):
            pack(weight, bits, layout)
    with pytest.raises(ValueError, match="row 1 of index has a bit set beyond column 12"):
        native.weight(weight, bits, None, 12, "dense")  # a merge into which would follow the bit past the last row


def test_a_number_of_columns_that_overflows_is_refused(path: str) -> None:
    nothing, index = torch.empty(2, 0), torch.zeros(2, 1, dtype=torch.uint8)
    for columns in (2**63 - 1, 2**63 - 8):
        with pytest.raises(ValueError, match=r"index has shape \[2, 1\], expected \[\*, 11529215046068469"):
            native.weight(nothing, index, None, columns, "bitmap")


def test_wrong_dtype_shape_layout_and_device_are_refused(path: str) -> None:
    weight, bits = random_weight(4, 16, torch.float32), bits_of(random_mask(4, 16, 0.5))
    with pytest.raises(ValueError, match="weight is int64, expected bfloat16 or"):
        pack(weight.long(), bits, "bitmap")
    with pytest.raises(ValueError, match="expected"):
        pack(weight[0], bits, "dense")
    with pytest.raises(ValueError, match=r"index has shape \[3, 2\], expected \[4, 2\]"):
        pack(weight, bits[:3], "dense")
    with pytest.raises(ValueError, match='layout must be "dense", "bitmap" or "semi24", not "csr"'):
        pack(weight, bits, "csr")
    with pytest.raises(ValueError, match="weight is on meta"):
        pack(weight.to("meta"), bits, "bitmap")


def test_views_check_what_they_are_given() -> None:
    view = native.extension().View
    with pytest.raises(ValueError, match="dtype int8 is not one"):
        view(8, "int8", (1,), (1,))
    with pytest.raises(ValueError, match="as many strides as sizes"):
        view(8, "float32", (1, 2), (1,))
    with pytest.raises(ValueError, match="non-negative"):
        view(8, "float32", (1, -2), (1, 1))
    with pytest.raises(ValueError, match="fit in 63 bits"):
        view(8, "float32", (2**40, 2**40), (1, 1))
    with pytest.raises(ValueError, match="needs an address"):
        view(0, "float32", (1,), (1,))
    with pytest.raises(ValueError, match="aligned to 4 bytes"):
        view(6, "float32", (1,), (1,))
