"""Tiles of a packed weight: formed with an adapter, folded into its gradients, stored, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from perp_kernels import SparseWeight
from perp_kernels.cpu import native, tiles
from perp_kernels.cpu.pack import pack

from .native import PATHS, bits_of, force, needs_native, nm_mask, random_mask, random_weight, same_bits

pytestmark = needs_native
LAYOUTS = ("dense", "bitmap", "semi24")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EFFECTS = ("add", "multiply")
SCALE = 1.5
# Columns stand around a vector (16, 32) and a segment (512); rows around a block (8) and a group (256).
SHAPES = [(1, 4), (7, 12), (9, 36), (23, 516), (261, 548)]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from force(request.param)


class Case:
    """A weight in a layout, its dense form and mask by definition, and an adapter."""

    def __init__(
        self, shape: tuple[int, int], layout: str, dtype: torch.dtype, rank: int = 3, kept: float = 0.5
    ) -> None:
        rows, columns = shape
        self.layout, self.shape = layout, shape
        self.mask = nm_mask(rows, columns) if layout == "semi24" else random_mask(rows, columns, kept)
        weight = random_weight(rows, columns, dtype)
        self.dense = torch.where(self.mask, weight, torch.zeros((), dtype=dtype))
        self.values, self.index, self.row_ptr = pack(weight, bits_of(self.mask), layout)
        random = torch.Generator().manual_seed(5)
        self.A = torch.randn(rank, columns, generator=random)
        self.B = torch.randn(rows, rank, generator=random)
        self.handle = native.weight(self.values, self.index, self.row_ptr, columns, layout)

    def formed(self, effect: str, rows: slice, columns: slice) -> Tensor:
        """A tile by the kernel, in poisoned memory that is wider than the tile; what stands beside it must stay."""
        A, B = self.A[:, columns], self.B[rows]
        board = torch.full((len(B), A.shape[1] + 5), torch.nan, dtype=self.dense.dtype)
        out = board[:, 2:-3]
        factors = native.view("A", A), native.view("B", B)
        at = rows.start, columns.start
        native.extension().form_tile(self.handle, *at, effect, SCALE, *factors, native.view("out", out))
        assert int(board.isnan().sum()) == board.numel() - out.numel() + int(out.isnan().sum())
        return out

    def folded(self, effect: str, rows: slice, columns: slice, G: Tensor) -> tuple[Tensor, Tensor]:
        """dA and dB of a tile by the kernel, added to ones."""
        A, B = self.A[:, columns], self.B[rows]
        dA, dB = torch.ones_like(A), torch.ones_like(B)
        views = [native.view(name, t) for name, t in (("A", A), ("B", B), ("G", G), ("dA", dA), ("dB", dB))]
        native.extension().fold_tile(self.handle, rows.start, columns.start, effect, SCALE, *views)
        return dA, dB

    def slope(self, effect: str) -> Tensor:
        """What the gradient by the effective weight is multiplied by, in float64."""
        return SCALE * self.mask.double() if effect == "add" else self.dense.double()


def tiles_of(shape: tuple[int, int]) -> list[tuple[slice, slice]]:
    """The whole, and parts that begin and end inside: columns at multiples of 8."""
    rows, columns = shape
    parts = [(slice(0, rows), slice(0, columns))]
    if rows > 3 and columns > 16:
        parts += [(slice(2, rows - 1), slice(8, columns)), (slice(0, rows), slice(8, 8 + (columns - 8) // 8 * 8))]
    return parts


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tile_is_formed_in_float32_and_rounded_once(
    path: str, shape: tuple[int, int], layout: str, dtype: torch.dtype, effect: str
) -> None:
    case = Case(shape, layout, dtype)
    P = case.B.double() @ case.A.double()
    exact = (case.dense.double() + SCALE * P if effect == "add" else case.dense.double() * P) * case.mask
    # One rounding to the dtype, of a sum of rank + 1 terms whose magnitudes bound each of its roundings.
    terms = case.dense.double().abs() + SCALE * (case.B.abs().double() @ case.A.abs().double())
    if effect == "multiply":
        terms = case.dense.double().abs() * (case.B.abs().double() @ case.A.abs().double())
    info = torch.finfo(dtype)
    allowed = exact.abs() * info.eps / 2 + 4 * torch.finfo(torch.float32).eps * terms + info.smallest_normal * info.eps
    for rows, columns in tiles_of(shape):
        out = case.formed(effect, rows, columns)
        assert bool(((out.double() - exact[rows, columns]).abs() <= allowed[rows, columns]).all())
        assert same_bits(out.masked_fill(case.mask[rows, columns], 0), torch.zeros_like(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_element_has_the_same_bits_in_every_tile(path: str, layout: str, dtype: torch.dtype) -> None:
    case = Case((23, 548), layout, dtype)
    for effect in EFFECTS:
        whole = case.formed(effect, slice(0, 23), slice(0, 548))
        for rows, columns in tiles_of(case.shape):
            assert same_bits(case.formed(effect, rows, columns), whole[rows, columns])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_decoded_tile_has_the_bits_of_the_weight(path: str, layout: str, dtype: torch.dtype) -> None:
    case = Case((23, 548), layout, dtype)
    for rows, columns in tiles_of(case.shape):
        out = torch.full_like(case.dense[rows, columns], torch.nan)
        native.extension().unpack_tile(case.handle, rows.start, columns.start, native.view("out", out))
        assert same_bits(out, case.dense[rows, columns])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_denormals_infinities_and_nan_follow_the_definition(path: str, layout: str) -> None:
    case = Case((4, 40), layout, torch.bfloat16)
    tiny = torch.finfo(torch.bfloat16).smallest_normal / 4
    case.values.fill_(tiny)
    case.A.zero_()
    out = case.formed("add", slice(0, 4), slice(0, 40))
    assert bool(out[case.mask].eq(tiny).all())
    case.A.fill_(torch.inf)
    case.B.fill_(1.0)
    out = case.formed("add", slice(0, 4), slice(0, 40))
    assert bool(out[case.mask].eq(torch.inf).all())
    assert same_bits(out[~case.mask], torch.zeros_like(out[~case.mask]))
    case.A.fill_(torch.nan)
    out = case.formed("add", slice(0, 4), slice(0, 40))
    assert bool(out[case.mask].isnan().all())
    assert same_bits(out[~case.mask], torch.zeros_like(out[~case.mask]))


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_a_tile(path: str, layout: str, dtype: torch.dtype, rank: int) -> None:
    for shape in SHAPES:
        case = Case(shape, layout, dtype, rank)
        G = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)
        G[~case.mask] = torch.nan  # what is pruned must not count
        for effect in EFFECTS:
            dP = torch.where(case.mask, G.double(), 0) * case.slope(effect)
            for rows, columns in tiles_of(shape):
                A, B, part = case.A[:, columns], case.B[rows], dP[rows, columns]
                dA, dB = case.folded(effect, rows, columns, G[rows, columns])
                assert_as_good_as_torch(dA - 1, B.t(), part)
                assert_as_good_as_torch(dB - 1, part, A.t())


def assert_as_good_as_torch(got: Tensor, left: Tensor, right: Tensor) -> None:
    """Within twice the error of torch's float32 product and a rounding of the sums of magnitudes (and of the 1)."""
    exact = left.double() @ right.double()
    plain = left.float() @ right.float()
    magnitudes = left.double().abs() @ right.double().abs()
    allowed = 2 * (plain.double() - exact).abs().max() + (magnitudes + 2) * 2 * torch.finfo(torch.float32).eps
    assert bool(((got.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("kept", [0.0, 0.02, 1.0])
def test_uneven_empty_and_full_rows(path: str, kept: float) -> None:
    case = Case((19, 540), "bitmap", torch.float32, kept=kept)
    whole = slice(0, 19), slice(0, 540)
    exact = torch.where(case.mask, case.dense.double() + SCALE * (case.B.double() @ case.A.double()), 0)
    torch.testing.assert_close(case.formed("add", *whole), exact.float())
    G = torch.randn(19, 540)
    dA, dB = case.folded("add", *whole, G)
    dP = case.mask * G.double() * SCALE
    assert_as_good_as_torch(dA - 1, case.B.t(), dP)
    assert_as_good_as_torch(dB - 1, dP, case.A.t())


def test_either_gradient_alone(path: str) -> None:
    case = Case((23, 516), "bitmap", torch.float32)
    G = torch.randn(23, 516)
    both = case.folded("add", slice(0, 23), slice(0, 516), G)
    for position in (0, 1):
        alone = [torch.ones_like(t) if i == position else None for i, t in enumerate((case.A, case.B))]
        views = [native.view("d", t) if t is not None else None for t in alone]
        operands = [native.view("t", t) for t in (case.A, case.B, G)]
        native.extension().fold_tile(case.handle, 0, 0, "add", SCALE, *operands, *views)
        assert torch.equal(alone[position], both[position])


def test_results_repeat_and_do_not_depend_on_the_number_of_threads(path: str) -> None:
    case = Case((1100, 548), "bitmap", torch.bfloat16, rank=5)
    G = torch.randn(1100, 548).bfloat16()
    whole = slice(0, 1100), slice(0, 548)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 1, 4):
        torch.set_num_threads(threads)
        results.append((case.formed("add", *whole), *case.folded("multiply", *whole, G)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stored_rows_are_those_of_pack(path: str, layout: str, dtype: torch.dtype) -> None:
    case = Case((23, 516), layout, dtype)
    other = random_weight(23, 516, dtype, seed=8)
    expected = pack(other, bits_of(case.mask), layout)[0]
    values = torch.full_like(case.values, torch.nan)
    for rows in (slice(0, 9), slice(9, 9), slice(9, 23)):
        part = native.view("in", other[rows])
        native.extension().store_rows(case.handle, rows.start, part, native.view("values", values))
    assert same_bits(values, expected)


def test_wrong_arguments_are_refused() -> None:
    case = Case((8, 32), "bitmap", torch.float32)
    out = torch.empty(8, 16)

    def form(
        A: Tensor = case.A[:, :16],
        B: Tensor = case.B,
        out: Tensor = out,
        row: int = 0,
        column: int = 0,
        name: str = "add",
    ) -> None:
        views = [native.view("t", t) for t in (A, B, out)]
        native.extension().form_tile(case.handle, row, column, name, SCALE, *views)

    form()
    for message, arguments in [
        ("beyond the weight", {"row": 1}),
        ("beyond the weight", {"row": -1}),
        ("beyond the weight", {"column": 24}),
        ("multiple of 8", {"column": 4}),
        ("effect must be", {"name": "divide"}),
        (r"A has shape \[3, 32\], expected \[\*, 16\]", {"A": case.A}),
        (r"B has shape \[8, 2\], expected \[8, 3\]", {"B": case.B[:, :2]}),
        ("A is float64, expected float32", {"A": case.A[:, :16].double()}),
        ("out is bfloat16, expected float32", {"out": out.bfloat16()}),
        ("stride 1", {"out": torch.empty(16, 8).t()}),
        ("rows that overlap", {"out": torch.empty(16).expand(8, 16)}),
    ]:
        with pytest.raises(ValueError, match=message):
            form(**arguments)
    views = [native.view("t", t) for t in (case.A[:, :16], case.B, out)]
    with pytest.raises(ValueError, match="no gradient to fold"):
        native.extension().fold_tile(case.handle, 0, 0, "none", 1.0, *views, None, None)
    with pytest.raises(ValueError, match="dA has shape"):
        native.extension().fold_tile(case.handle, 0, 0, "add", 1.0, *views, native.view("dA", case.A), None)
    with pytest.raises(ValueError, match="dB has shape"):
        native.extension().fold_tile(case.handle, 0, 0, "add", 1.0, *views, None, native.view("dB", case.B[:, :1]))
    values = native.view("values", case.values)
    with pytest.raises(ValueError, match="all columns"):
        native.extension().store_rows(case.handle, 0, native.view("in", out), values)
    with pytest.raises(ValueError, match="values has shape"):
        native.extension().store_rows(
            case.handle, 0, native.view("in", torch.empty(8, 32)), native.view("values", case.values[:-1])
        )


def test_memory_is_kept_between_calls_and_given_up() -> None:
    case = Case((40, 64), "bitmap", torch.float32)
    w = tiles.DecodedTiles(case.values, case.index, case.row_ptr, "bitmap", [40, 64])
    with torch.inference_mode():
        first = w.form(0, w.row_tiles[0]).data_ptr()
    tile = w.form(0, w.row_tiles[0])
    assert tile.data_ptr() == first
    assert not tile.is_inference()
    assert same_bits(tile, case.dense)
    tiles.release_memory()
    assert same_bits(w.form(0, w.sum_tiles[0]), case.dense)


@pytest.mark.parametrize("count", [0, 1, 7, 64, 1000])
def test_cuts_cover_everything_once(count: int) -> None:
    for most in (1, 8, 100, 5000):
        bounds = tiles._cut(count, most, 8)
        assert [i for start, stop in bounds for i in range(start, stop)] == list(range(count))
        assert all(start % 8 == 0 and stop - start <= max(most, 8) for start, stop in bounds)


def test_components_that_contradict_each_other_are_refused() -> None:
    case = Case((8, 32), "bitmap", torch.float32)
    case.index[3, 1] ^= 1
    w = SparseWeight(case.values, case.index, case.row_ptr, (8, 32), "bitmap")
    with pytest.raises(ValueError, match="row 3 of index"):
        w.add_lowrank_(case.A, case.B, 1.0)
