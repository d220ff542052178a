"""select of the native extension against a stable sort, on every code path."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from perp_kernels import Pattern
from perp_kernels.cpu import native
from perp_kernels.cpu.select import ELEMENTS, select

from .native import PATHS, force, needs_native
from .oracles import normal

pytestmark = needs_native
PATTERNS = (
    "0.5/row",
    "0.97/row",
    "0.001",
    "0.35/matrix",
    "0.5/slab",
    "1:2",
    "2:4",
    "1:4",
    "5:8",
    "8:16",
    "3:5",
    "40:80",
)
SHAPES = [(1, 80), (7, 240), (3, 400), (0, 80), (3, 0)]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from force(request.param)


def by_stable_sort(scores: Tensor, text: str) -> Tensor:
    """The definition, scope by scope: of a stable ascending sort the first go."""
    pattern, (N, K) = Pattern.parse(text), scores.shape
    if pattern.m is not None:
        scopes = scores.reshape(-1, pattern.m)
    elif pattern.scope == "matrix":
        scopes = scores.reshape(1, -1)
    elif pattern.scope == "slab":
        slabs = scores.split(128, dim=1)
        return torch.cat([by_stable_sort(slab, f"{text.partition('/')[0]}/matrix") for slab in slabs], dim=1)
    else:
        scopes = scores
    order = np.argsort(scopes.double().numpy(), axis=1, kind="stable")
    mask = np.ones(scopes.shape, dtype=bool)
    np.put_along_axis(mask, order[:, : pattern.pruned(scopes.shape[1])], False, axis=1)
    return torch.from_numpy(mask).view(N, K)


def tied(N: int, K: int, dtype: torch.dtype) -> Tensor:
    """Scores of few values, zeros of both signs and infinities among them, and a row of one value alone."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, 2.0, 3e-7])
    scores = values[torch.randint(8, (N, K), generator=torch.Generator().manual_seed(0))].to(dtype)
    if N > 1:
        scores[1] = 1.0
    return scores


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("text", PATTERNS)
def test_matches_the_definition(path: str, dtype: torch.dtype, text: str) -> None:
    for shape in SHAPES:
        for scores in (normal(*shape, dtype=dtype), normal(*shape, dtype=dtype).abs(), tied(*shape, dtype)):
            if scores.numel():
                assert torch.equal(select(scores, text), by_stable_sort(scores, text))
            else:
                assert select(scores, text).shape == shape


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("text", ["0.5/matrix", "0.02/matrix", "0.999/matrix", "0.5/slab"])
def test_large_scopes_are_sampled(path: str, dtype: torch.dtype, text: str) -> None:
    shape = (600, 256)
    rising = torch.arange(600 * 256).view(shape).to(dtype)
    by_column = normal(*shape) + 100 * torch.arange(256)
    for scores in (normal(*shape, dtype=dtype), rising, by_column.to(dtype), tied(*shape, dtype)):
        assert torch.equal(select(scores, text), by_stable_sort(scores, text))


@pytest.mark.parametrize("text", ["0.5/matrix", "0.9/row"])
def test_a_row_longer_than_the_cache(path: str, text: str) -> None:
    scores = normal(2, 140_000)
    assert torch.equal(select(scores, text), by_stable_sort(scores, text))


def test_denormal_scores_are_told_apart(path: str) -> None:
    scores = torch.arange(64, dtype=torch.int32).flip(0).view(torch.float32).view(1, 64)
    for text in ("0.5", "2:4", "0.5/matrix"):
        assert torch.equal(select(scores, text), by_stable_sort(scores, text))


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("text", ["0.5", "0.001", "0.5/matrix", "0.5/slab", "2:4", "3:5"])
@pytest.mark.parametrize("nan", [torch.nan, -torch.nan], ids=str)
def test_nan_is_refused_wherever_it_is(path: str, dtype: torch.dtype, text: str, nan: float) -> None:
    for place in ((0, 0), (3, 139), (699, 118)):
        scores = torch.ones(700, 140, dtype=dtype)
        scores[place] = nan
        with pytest.raises(ValueError, match="Scores hold NaN, which has no rank"):
            select(scores, text)


def test_experts_are_matrices(path: str) -> None:
    scores = normal(3, 6, 160)
    for text in PATTERNS:
        assert torch.equal(select(scores, text), torch.stack([by_stable_sort(matrix, text) for matrix in scores]))


@pytest.mark.parametrize("text", PATTERNS)
def test_results_repeat_whatever_the_number_of_threads(text: str) -> None:
    scores = torch.cat([tied(200, 400, torch.float32), normal(200, 400)])
    threads, masks = torch.get_num_threads(), []
    for count in (1, 4, 3):
        torch.set_num_threads(count)
        masks.append(select(scores, text))
    torch.set_num_threads(threads)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_bad_views_are_refused() -> None:
    extension, view = native.extension(), native.view
    scores, kept = normal(4, 8), torch.empty(4, 8, dtype=torch.uint8)
    bad = [
        ("scores is int64", scores.long(), kept),
        (r"kept has shape \[3, 8\], expected \[4, 8\]", scores, kept[:3]),
        ("kept is float32, expected uint8", scores, scores),
        ("scores must have stride 1", normal(8, 4).t(), kept),
    ]
    for sentence, given, out in bad:
        with pytest.raises(ValueError, match=sentence):
            extension.select_rows(view("scores", given), 3, view("kept", out))
    both = view("scores", scores), view("kept", kept)
    for pruned in (-1, 33):
        with pytest.raises(ValueError, match="scores cannot be pruned"):
            extension.select_jointly(both[0], pruned, both[1])
    with pytest.raises(ValueError, match="9 of 8 scores"):
        extension.select_rows(both[0], 9, both[1])
    for group in (0, 3):
        with pytest.raises(ValueError, match=f"do not divide into groups of {group}"):
            extension.select_groups(both[0], group, 1, both[1])
