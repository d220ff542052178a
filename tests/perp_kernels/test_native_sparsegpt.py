"""The column loop of sparsegpt in the native extension against float64, on every code path.

Rounding may tip a choice between near equal scores, and every column after it. So the choices are compared where the
arithmetic is exact, and where it rounds the update is compared under the mask that was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import perp_kernels as pk
from perp_kernels import Pattern
from perp_kernels.cpu import native
from perp_kernels.cpu.sparsegpt import sparsegpt_block_

from .native import PATHS, force, needs_native, same_bits
from .oracles import assert_no_worse, normal

pytestmark = needs_native
# Rows around the 32 of a bundle and its halves, columns around a panel (8) and a vector (16); groups that fit a panel,
# span several, and do neither.
SHAPES = [(1, 1), (3, 7), (16, 8), (31, 24), (33, 40), (70, 128)]
SHARES = ("0.5", "0.3/slab", "0.6/row", "0.001")
GROUPS = [("2:4", 24), ("1:2", 6), ("4:8", 40), ("3:5", 35), ("5:16", 48), ("7:12", 24), ("3:24", 48), ("30:72", 144)]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from force(request.param)


def solve(W: Tensor, U: Tensor, text: str) -> tuple[Tensor, Tensor, Tensor]:
    """(new W, errors, mask), each read out of the middle of a wider matrix that must stay as it was."""
    N, b = W.shape
    wide, errors = torch.full((N, b + 5), torch.nan), torch.full((N, b + 9), torch.nan)
    kept = torch.zeros(N, b + 3, dtype=torch.bool)
    wide[:, 2 : b + 2] = W
    U_wide = torch.full((b, b + 4), torch.nan)
    U_wide[:, 3 : b + 3] = U
    inner = wide[:, 2 : b + 2], U_wide[:, 3 : b + 3], errors[:, 7 : b + 7], kept[:, 1 : b + 1]
    sparsegpt_block_(*inner[:2], text, *inner[2:])
    for outer, start, stop in ((wide, 2, 3), (errors, 7, 2)):
        assert outer[:, :start].isnan().all()
        assert outer[:, -stop:].isnan().all()
    assert not kept[:, 0].any()
    assert not kept[:, -2:].any()
    return inner[0].clone(), inner[2].clone(), inner[3].clone()


def lowest(scores: Tensor, pruned: int) -> Tensor:
    """The mask [R, L] without the first `pruned` of a stable ascending sort of each row."""
    mask = np.ones(scores.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(scores.numpy(), axis=1, kind="stable")[:, :pruned], False, axis=1)
    return torch.from_numpy(mask)


def definition(W: Tensor, U: Tensor, text: str, given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The loop column by column in the dtype of W, by its own choices or by a given mask."""
    pattern, W, (N, b) = Pattern.parse(text), W.clone(), W.shape
    mask, errors, d = torch.ones(N, b, dtype=torch.bool), torch.zeros_like(W), U.diagonal()
    for j in range(b):
        if given is not None:
            mask[:, j] = given[:, j]
        elif pattern.m is not None:
            if j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                mask[:, group] = lowest((W[:, group] / d[group]) ** 2, pattern.pruned(pattern.m))
        elif j == 0:
            scores = (W / d) ** 2
            mask = lowest(
                scores if pattern.scope == "row" else scores.view(1, -1),
                pattern.pruned(b if pattern.scope == "row" else N * b),
            ).view(N, b)
        errors[:, j] = torch.where(mask[:, j], 0, W[:, j]) / d[j]
        W[:, j] = torch.where(mask[:, j], W[:, j], 0)
        W[:, j + 1 :] -= errors[:, j, None] * U[j, j + 1 :]
    return W, errors, mask


def whole_numbers(N: int, b: int) -> tuple[Tensor, Tensor]:
    """A block in which no operation rounds, so that equal scores, of which there are many, tie exactly."""
    W = torch.randint(-4, 5, (N, b), generator=torch.Generator().manual_seed(N)).float()
    U = torch.randint(-12, 13, (b, b), generator=torch.Generator().manual_seed(b)).float()
    return W, torch.where(U.abs() == 1, U, 0).triu(1) + torch.eye(b)


def factor(b: int) -> Tensor:
    x = normal(4 * b + 4, b, dtype=torch.float64) @ (torch.eye(b, dtype=torch.float64) + 0.3 * normal(b, b, seed=3))
    return torch.linalg.cholesky(torch.linalg.inv(x.t() @ x), upper=True).float()


@pytest.mark.parametrize(
    "text,shape", [(s, shape) for s in SHARES for shape in SHAPES] + [(g, (37, b)) for g, b in GROUPS]
)
def test_choices_are_exact_where_the_arithmetic_is(path: str, text: str, shape: tuple[int, int]) -> None:
    W, U = whole_numbers(*shape)
    got, expected = solve(W, U, text), definition(W.double(), U.double(), text)
    assert max(t.abs().max() for t in expected[:2]) < 2**24
    assert torch.equal(got[2], expected[2])
    assert torch.equal(got[0].double(), expected[0])
    assert torch.equal(got[1].double(), expected[1])
    zeros = got[0][~got[2]]
    assert same_bits(zeros, torch.zeros_like(zeros))


@pytest.mark.parametrize(
    "text,shape", [("0.5", (70, 128)), ("0.6/row", (5, 300)), ("2:4", (40, 128)), ("3:5", (33, 45))]
)
def test_update_under_the_chosen_mask_is_as_exact_as_torch(path: str, text: str, shape: tuple[int, int]) -> None:
    W, U = normal(*shape), factor(shape[1])
    new, errors, mask = solve(W, U, text)
    exact, plain = definition(W.double(), U.double(), text, mask), definition(W, U, text, mask)
    assert_no_worse(new, plain[0], exact[0])
    assert_no_worse(errors, plain[1], exact[1])
    assert new[~mask].eq(0).all()


@pytest.mark.parametrize("text,b", GROUPS)
def test_groups_keep_their_highest_scores(path: str, text: str, b: int) -> None:
    W, U, pattern = normal(37, b), factor(b), Pattern.parse(text)
    _, errors, mask = solve(W, U, text)
    assert pattern.m is not None
    m = pattern.m
    for first in range(0, b, m):
        group = slice(first, first + m)
        # The group's weights as its first column is reached: less the errors of all columns before.
        reached = W[:, group].double() - errors[:, :first].double() @ U[:first, group].double()
        scores, kept = (reached / U.double().diagonal()[group]) ** 2, mask[:, group]
        assert (kept.sum(1) == m - pattern.pruned(m)).all()
        lowest_kept = scores.masked_fill(~kept, torch.inf).amin(1)
        highest_pruned = scores.masked_fill(kept, -torch.inf).amax(1)
        assert (highest_pruned <= lowest_kept + 1e-4 * scores.amax(1)).all()


@pytest.mark.parametrize("text", ["0.5", "0.6/row", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_solve_is_as_good_as_the_reference(path: str, text: str, dtype: torch.dtype) -> None:
    x = normal(400, 200) @ normal(200, 200, seed=3)
    weight, H = normal(40, 200, seed=4).to(dtype), x.t() @ x

    def loss(new: Tensor) -> float:
        change = (new.double() - weight.double()) @ H.double()
        return float((change * (new.double() - weight.double())).sum())

    with pk.dispatch.served() as served:
        new, mask = pk.sparsegpt(weight, H, text)
    assert served == {("sparsegpt", "cpu"), ("sparsegpt_block_", "cpu")}
    with pk.backend("reference"):
        expected, expected_mask = pk.sparsegpt(weight, H, text)
    assert mask.sum() == expected_mask.sum()
    assert new[~mask].eq(0).all()
    assert loss(new) < 1.01 * loss(expected)


@pytest.mark.parametrize("text", ["0.5", "0.6/row", "2:4", "3:5"])
def test_results_repeat_whatever_the_number_of_threads(path: str, text: str) -> None:
    W, U = normal(700, 120), factor(120)
    threads, results = torch.get_num_threads(), []
    for count in (1, 4, 3):
        torch.set_num_threads(count)
        results.append(solve(W, U, text))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_rows_and_no_columns(path: str) -> None:
    for N, b in ((0, 8), (4, 0), (0, 0)):
        for text in ("0.5", "0.5/row", "2:4"):
            new, errors, mask = solve(torch.empty(N, b), torch.eye(b), text)
            assert new.shape == errors.shape == mask.shape == (N, b)


def test_bad_views_are_refused() -> None:
    extension, view = native.extension(), native.view
    W, U, kept = normal(4, 8), torch.eye(8), torch.empty(4, 8, dtype=torch.uint8)
    bad = [
        ("W is float64, expected float32", W.double(), U, W, kept),
        (r"U has shape \[7, 7\], expected \[8, 8\]", W, U[1:, 1:], W, kept),
        (r"errors has shape \[3, 8\], expected \[4, 8\]", W, U, W[:3], kept),
        (r"kept has shape \[4, 7\], expected \[4, 8\]", W, U, W, kept[:, :7]),
        ("W must have stride 1", normal(8, 4).t(), U, W, kept),
        ("W has rows that overlap", W[:1].expand(4, 8), U, W, kept),
    ]
    for sentence, *tensors in bad:
        views = [view("tensor", tensor) for tensor in tensors]
        with pytest.raises(ValueError, match=sentence):
            extension.sparsegpt_share(*views[:2], 3, True, *views[2:])
    views = [view("tensor", tensor) for tensor in (W, U, W.clone(), kept)]
    with pytest.raises(ValueError, match="33 of 32 weights"):
        extension.sparsegpt_share(*views[:2], 33, True, *views[2:])
    with pytest.raises(ValueError, match="9 of 8 weights"):
        extension.sparsegpt_share(*views[:2], 9, False, *views[2:])
    for group, pruned, sentence in ((0, 0, "groups of 0"), (3, 1, "groups of 3"), (4, 5, "5 of each 4")):
        with pytest.raises(ValueError, match=sentence):
            extension.sparsegpt_groups(*views[:2], group, pruned, *views[2:])
