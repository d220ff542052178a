"""sparse_linear of the native extension against float64, on every code path and in every layout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import perp_kernels as pk
from perp_kernels import cpu
from perp_kernels.cpu import native
from perp_kernels.cpu.pack import pack
from perp_kernels.cpu.sparse_linear import sparse_linear

from .native import PATHS, bits_of, force, needs_native, nm_mask, random_mask, random_weight

pytestmark = needs_native
LAYOUTS = ("dense", "bitmap", "semi24")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The widths stand around a vector (16, 32), a block of index (128) and a depth of the register tile (512, 1024).
SHAPES = [(1, 4), (3, 12), (5, 132), (7, 516), (9, 1300), (70, 96)]
# Every kernel: one token, fused rows in groups of 1, 4 and 3, tiles with and without a remainder.
TOKENS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 18, 23]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from force(request.param)


def packed(shape: tuple[int, int], dtype: torch.dtype, layout: str, kept: float = 0.5) -> tuple[tuple, Tensor]:
    """Components of a random weight, and the dense matrix that they stand for by definition."""
    mask = nm_mask(*shape) if layout == "semi24" else random_mask(*shape, kept)
    weight = random_weight(*shape, dtype)
    return pack(weight, bits_of(mask), layout), torch.where(mask, weight, torch.zeros((), dtype=dtype))


def call(x: Tensor, components: tuple, layout: str, dense: Tensor, bias: Tensor | None = None) -> Tensor:
    values, index, row_ptr = components
    return sparse_linear(x, values, index, row_ptr, layout, list(dense.shape), bias, None)


def assert_as_good_as_torch(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    """Error against float64 within twice that of a product in float32 rounded once, elementwise in the worst case."""
    exact = F.linear(x.double(), dense.double(), None if bias is None else bias.double())
    plain = F.linear(x.float(), dense.float(), None if bias is None else bias.float()).to(x.dtype)
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    if not len(x):
        return
    # What a sum in another order may cost where torch's happens to be exact: one rounding of the largest result, and
    # one of the largest sum of magnitudes while it is formed.
    magnitudes = F.linear(x.double().abs(), dense.double().abs()).max()
    slack = exact.abs().max() * torch.finfo(x.dtype).eps + magnitudes * torch.finfo(torch.float32).eps
    assert bool(((y.double() - exact).abs() <= 2 * (plain.double() - exact).abs().max() + slack).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_and_bias(path: str, shape: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    components, dense = packed(shape, dtype, layout)
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
        bias = (None, torch.randn(shape[0]), torch.randn(shape[0]).to(dtype))[tokens % 3]
        assert_as_good_as_torch(call(x, components, layout, dense, bias), x, dense, bias)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.97, 1.0])
def test_uneven_and_empty_rows(path: str, kept: float) -> None:
    components, dense = packed((37, 500), torch.bfloat16, "bitmap", kept)
    for tokens in (1, 4, 40):
        x = torch.randn(tokens, 500).bfloat16()
        assert_as_good_as_torch(call(x, components, "bitmap", dense), x, dense, None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_tokens_take_torchs_product_by_tiles(path: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.sparse_linear, "PACKED_TOKENS", dict.fromkeys(PATHS, dict.fromkeys(DTYPES, 0)))
    for bound in ("_LEAST_BYTES", "_MOST_BYTES"):
        monkeypatch.setattr(cpu.tiles, bound, 8 * 4 * 260)  # several tiles, the last one short
    components, dense = packed((71, 260), torch.float32, layout)
    x, bias = torch.randn(11, 260), torch.randn(71)
    assert_as_good_as_torch(call(x, components, layout, dense, bias), x, dense, bias)


def test_output_is_written_whole_and_nothing_beside_it(path: str) -> None:
    components, dense = packed((13, 200), torch.float32, "bitmap")
    values, index, row_ptr = components
    for tokens in (1, 4, 9):
        x, board = torch.randn(tokens, 200), torch.full((tokens + 2, 29), float("nan"))
        y = board[1:-1, 8:21]
        handle = native.weight(values, index, row_ptr, 200, "bitmap")
        handle.linear(native.view("x", x), native.view("y", y), None, 0)
        assert_as_good_as_torch(y, x, dense, None)
        board[1:-1, 8:21] = 0
        assert int(board.isnan().sum()) == board.numel() - y.numel()


def test_leading_dimensions_and_strided_inputs(path: str) -> None:
    components, dense = packed((6, 36), torch.float32, "bitmap")
    for x in (torch.randn(2, 3, 36), torch.randn(36), torch.randn(36, 5).t(), torch.randn(5, 50)[:, 7:43]):
        y = call(x, components, "bitmap", dense)
        assert y.shape == (*x.shape[:-1], 6)
        assert_as_good_as_torch(y.view(-1, 6), x.reshape(-1, 36), dense, None)


def test_strided_biases(path: str) -> None:
    components, dense = packed((6, 36), torch.float32, "bitmap")
    x = torch.randn(3, 36)
    for bias in (torch.randn(12)[::2], torch.randn(1).expand(6)):
        assert_as_good_as_torch(call(x, components, "bitmap", dense, bias), x, dense, bias)
    values, index, row_ptr = components
    bias = torch.randn(2, 3).t()
    y = sparse_linear(x, values, index, row_ptr, "bitmap", [3, 2, 36], bias, torch.tensor([1, 2, 3]))
    for expert in range(3):
        own = slice(2 * expert, 2 * expert + 2)
        assert_as_good_as_torch(y[expert : expert + 1], x[expert : expert + 1], dense[own], bias[expert])


def test_strided_values_are_not_taken_for_those_of_an_earlier_call() -> None:
    w = pk.pack(torch.randn(8, 16), (torch.arange(16) % 2 == 0).expand(8, 16), "bitmap")
    turned = pk.SparseWeight(w.values.t(), w.index, None, w.shape, "bitmap")
    x = torch.ones(1, 16)
    pk.sparse_linear(x, w)
    torch.testing.assert_close(pk.sparse_linear(x, turned), w.values.sum(0)[None])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("layout", ["bitmap", "semi24"])
def test_experts_take_their_own_tokens(path: str, layout: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr(cpu.sparse_linear, "PACKED_TOKENS", dict.fromkeys(PATHS, dict.fromkeys(DTYPES, 0)))
    (values, index, row_ptr), dense = packed((3 * 11, 140), torch.float32, layout)
    x, bias, ends = torch.randn(17, 140), torch.randn(3, 11), [9, 9, 17]
    y = sparse_linear(x, values, index, row_ptr, layout, [3, 11, 140], bias, torch.tensor(ends))
    for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        rows = dense[11 * expert : 11 * (expert + 1)]
        assert_as_good_as_torch(y[begin:end], x[begin:end], rows, bias[expert])
    with pytest.raises(ValueError, match="Offsets must rise"):
        sparse_linear(x, values, index, row_ptr, layout, [3, 11, 140], bias, torch.tensor([9, 8, 17]))


def test_infinite_and_nan_inputs_reach_the_output(path: str) -> None:
    components, dense = packed((5, 140), torch.bfloat16, "bitmap", kept=1.0)
    for value in (float("inf"), float("nan")):
        x = torch.randn(2, 140).bfloat16()
        x[1, 139] = value
        y = call(x, components, "bitmap", dense)
        assert bool(y[0].isfinite().all())
        assert not bool(y[1].isfinite().any())


@pytest.mark.parametrize("tokens", [1, 3, 8, 20])
def test_results_repeat_and_do_not_depend_on_the_number_of_threads(path: str, tokens: int) -> None:
    components, dense = packed((333, 640), torch.bfloat16, "bitmap")
    x = torch.randn(tokens, 640).bfloat16()
    before = torch.get_num_threads()
    results = []
    for threads in (1, 1, 3):
        torch.set_num_threads(threads)
        results.append(call(x, components, "bitmap", dense))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_op_takes_the_native_kernel() -> None:
    w = pk.pack(torch.randn(24, 64), random_mask(24, 64, 0.5), "bitmap")
    x = torch.randn(3, 64)
    with pk.backend("cpu"):
        y = pk.sparse_linear(x, w)
    assert_as_good_as_torch(y, x, w.unpack(), None)


def test_a_handle_is_checked_again_when_its_components_change(path: str) -> None:
    (values, index, row_ptr), dense = packed((9, 40), torch.float32, "bitmap")
    x = torch.randn(2, 40)
    call(x, (values, index, row_ptr), "bitmap", dense)
    index[4, 1] ^= 1
    with pytest.raises(ValueError, match="row 4 of index"):
        call(x, (values, index, row_ptr), "bitmap", dense)
    index[4, 1] ^= 1
    call(x, (values, index, row_ptr), "bitmap", dense)
    values *= 2
    assert_as_good_as_torch(call(x, (values, index, row_ptr), "bitmap", dense), x, 2 * dense, None)


def test_a_handle_without_a_version_is_checked_each_time(path: str) -> None:
    with torch.inference_mode():
        components, dense = packed((9, 40), torch.float32, "bitmap")
        x = torch.randn(2, 40)
        assert_as_good_as_torch(call(x, components, "bitmap", dense), x, dense, None)
        components[1][4, 1] ^= 1
        with pytest.raises(ValueError, match="row 4 of index"):
            call(x, components, "bitmap", dense)


def test_a_handle_goes_with_its_index() -> None:
    (values, index, row_ptr), dense = packed((4, 16), torch.float32, "bitmap")
    call(torch.randn(1, 16), (values, index, row_ptr), "bitmap", dense)
    identity = id(index)
    assert identity in native._handles
    del index
    assert identity not in native._handles


def test_wrong_arguments_are_refused(path: str) -> None:
    (values, index, row_ptr), _ = packed((8, 32), torch.float32, "bitmap")
    handle = native.weight(values, index, row_ptr, 32, "bitmap")
    x, y = torch.randn(2, 32), torch.empty(2, 8)

    def linear(x: Tensor, y: Tensor, bias: Tensor | None = None, first_row: int = 0) -> None:
        handle.linear(
            native.view("x", x), native.view("y", y), None if bias is None else native.view("b", bias), first_row
        )

    with pytest.raises(ValueError, match="x is bfloat16, expected float32"):
        linear(x.bfloat16(), y)
    with pytest.raises(ValueError, match=r"x has shape \[2, 31\], expected \[\*, 32\]"):
        linear(x[:, :31], y)
    with pytest.raises(ValueError, match="stride 1"):
        linear(torch.randn(2, 64)[:, ::2], y)
    with pytest.raises(ValueError, match="rows that overlap"):
        linear(x, torch.empty(8).expand(2, 8))
    with pytest.raises(ValueError, match=r"y has shape \[3, 8\]"):
        linear(x, torch.empty(3, 8))
    with pytest.raises(ValueError, match="bias has shape"):
        linear(x, y, torch.randn(7))
    with pytest.raises(ValueError, match="no 8 rows from row 1 on"):
        linear(x, y, None, 1)
    with pytest.raises(ValueError, match="no 8 rows from row -1 on"):
        linear(x, y, None, -1)
    with pytest.raises(ValueError, match="only the layout bitmap"):
        native.weight(values.view(-1)[:0], index, torch.zeros(9, dtype=torch.int64), 32, "dense")
    with pytest.raises(ValueError, match="float64"):
        native.weight(torch.randn(8, 32).double(), index, None, 32, "dense")


def test_more_tokens_than_are_taken_at_once(path: str) -> None:
    components, dense = packed((9, 40), torch.float16, "bitmap")
    x, bias = torch.randn(1200, 40).half(), torch.randn(9).half()
    assert_as_good_as_torch(call(x, components, "bitmap", dense, bias), x, dense, bias)


def test_denormals_are_stored_alike_in_every_row(path: str) -> None:
    """A row alone, and in a group of four that is stored at once."""
    values, index, row_ptr = packed((5, 64), torch.bfloat16, "bitmap")[0]
    bias = torch.full((5,), 1e-39).bfloat16()
    assert bias[0] != 0
    for tokens in (1, 9):
        y = sparse_linear(torch.zeros(tokens, 64).bfloat16(), values, index, row_ptr, "bitmap", [5, 64], bias, None)
        assert torch.equal(y, bias.expand(tokens, 5))
