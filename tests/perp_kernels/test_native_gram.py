"""gram_ of the native extension against float64, on every code path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from perp_kernels.cpu import native
from perp_kernels.cpu.gram import ELEMENTS, gram

from .native import PATHS, force, needs_native
from .oracles import assert_no_worse, normal

pytestmark = needs_native
# The widths stand around a tile (8, 48), a block of four panels (192) and the columns of one product (512); the tokens
# around a pair, a step (128 words, 256 tokens in bf16) and the tokens widened at once (1,024).
SHAPES = [(0, 5), (1, 1), (2, 7), (3, 8), (127, 48), (128, 49), (257, 193), (300, 400), (1030, 97), (5, 520)]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from force(request.param)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("tokens,K", SHAPES)
def test_adds_the_product_as_exactly_as_torch(path: str, dtype: torch.dtype, tokens: int, K: int) -> None:
    x, before = normal(tokens, K, dtype=dtype), normal(K, K, seed=5)
    H = before.clone()
    gram(H, x, None)
    exact = before.double() + x.double().t() @ x.double()
    assert_no_worse(H, before + x.float().t() @ x.float(), exact)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_long_sums_of_one_sign(path: str, dtype: torch.dtype) -> None:
    x = normal(20_000, 9, dtype=dtype).abs()
    H = torch.zeros(9, 9)
    gram(H, x, None)
    assert_no_worse(H, x.float().t() @ x.float(), x.double().t() @ x.double())


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_a_symmetric_sum_stays_symmetric_to_the_bit(path: str, dtype: torch.dtype) -> None:
    H = normal(230, 230, seed=5)
    H += H.t().clone()
    for seed in range(3):
        gram(H, normal(150, 230, dtype=dtype, seed=seed), None)
    assert torch.equal(H, H.t())


def test_tokens_and_sums_between_other_data(path: str) -> None:
    base = normal(50, 200)
    grams = torch.full((3, 60, 60), torch.nan)
    grams[1] = 0
    for x in (base[:, 70:130], base[:, :60:1][::2], base[:, 40:160:2], base[:60].t()[:60, :50].t()):
        grams[1] = 0
        gram(grams[1], x, None)
        torch.testing.assert_close(grams[1], x.t() @ x)
    assert grams[[0, 2]].isnan().all()


@pytest.mark.parametrize("K", [1, 60])
def test_tokens_that_overlap_are_read_as_torch_reads_them(path: str, K: int) -> None:
    one = normal(1, K)
    for x in (one.expand(5, K), normal(K + 4).unfold(0, K, 1)):
        H = torch.zeros(K, K)
        gram(H, x, None)
        torch.testing.assert_close(H, x.t() @ x)


def test_autograd_sees_that_the_sum_has_changed(path: str) -> None:
    H, w = torch.zeros(8, 8), torch.ones(8, requires_grad=True)
    y = H @ w
    gram(H, normal(3, 8), None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.inference_mode():
        gram(torch.zeros(8, 8), normal(3, 8), None)  # such a tensor has no version


def test_experts(path: str) -> None:
    x, offsets = normal(9, 50), torch.tensor([2, 2, 9])
    H = torch.zeros(3, 50, 50)
    gram(H, x, offsets)
    torch.testing.assert_close(H, torch.stack([x[:2].t() @ x[:2], torch.zeros(50, 50), x[2:].t() @ x[2:]]))
    with pytest.raises(ValueError, match="Offsets must rise"):
        gram(H, x, torch.tensor([2, 1, 9]))


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_infinities_reach_their_own_columns_alone(path: str, dtype: torch.dtype) -> None:
    x = normal(3, 70, dtype=dtype)
    x[1, 60] = torch.inf
    H = torch.zeros(70, 70)
    gram(H, x, None)
    bad = ~H.isfinite()
    assert bad[60].all()
    assert bad[:, 60].all()
    assert bad.sum() == 139


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("tokens,K", [(300, 400), (2000, 64)])
def test_results_repeat_whatever_the_number_of_threads(dtype: torch.dtype, tokens: int, K: int) -> None:
    x = normal(tokens, K, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    for count in (1, 4, 3, 1):
        torch.set_num_threads(count)
        results.append(torch.ones(K, K))
        gram(results[-1], x, None)
    torch.set_num_threads(threads)
    if native.active_path() == "avx512":  # torch's own product may depend on them
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_bad_views_are_refused() -> None:
    extension, view = native.extension(), native.view
    x, H = normal(4, 8), torch.zeros(8, 8)
    bad = [
        ("x is float64", H, x.double()),
        (r"H has shape \[8, 8\], expected \[7, 7\]", H, x[:, 1:]),
        ("H is float64, expected float32", H.double(), x),
        ("H must be contiguous", torch.zeros(8, 9)[:, :8], x),
        ("stride 1", H, normal(8, 4).t()),
        ("overlap", H, x[:1].expand(4, 8)),
    ]
    for sentence, sums, tokens in bad:
        with pytest.raises(ValueError, match=sentence):
            extension.gram(view("H", sums), view("x", tokens))
