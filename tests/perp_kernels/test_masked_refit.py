"""masked_refit against least squares solved row by row in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import perp_kernels as pk

from .oracles import normal


def problem(N: int, K: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a mask whose rows keep unlike counts (row 0 nothing, row 1 all), inputs of unlike size, float64."""
    x = normal(tokens, K, dtype=torch.float64, seed=seed) @ normal(K, K, dtype=torch.float64, seed=seed + 1)
    x *= torch.logspace(-1, 1, K, dtype=torch.float64)
    weight = normal(N, K, dtype=torch.float64, seed=seed + 2)
    mask = torch.rand(N, K, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0], mask[1] = False, True
    return weight, mask, x


def row_by_row(weight: Tensor, mask: Tensor, x: Tensor, damp: float) -> Tensor:
    """Least squares on the inputs themselves; d ||w' - w||^2 is a token sqrt(d) e_j for each input j."""
    K = weight.shape[1]
    d = damp * (x.t() @ x).diagonal().mean()
    tokens = torch.cat([x, d.sqrt() * torch.eye(K, dtype=torch.float64)])
    new = torch.zeros_like(weight)
    for w, kept, out in zip(weight, mask, new, strict=True):
        if kept.any():
            out[kept] = torch.linalg.lstsq(tokens[:, kept], (tokens @ w)[:, None], driver="gelsd").solution[:, 0]
    return new


def errors(new: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    return ((new.double() - weight) @ x.t()).square().sum(1)


@pytest.mark.parametrize("damp", [0.0, 0.01, 0.5])
def test_is_the_least_squares_solution(damp: float) -> None:
    weight, mask, x = problem(9, 20, 60)
    new = pk.masked_refit(weight, mask, x.t() @ x, damp=damp)
    expected = row_by_row(weight, mask, x, damp)
    torch.testing.assert_close(new, expected, rtol=1e-6, atol=1e-6)
    assert new[~mask].eq(0).all()
    # Not the ridge towards zero, which shrinks the weights that are kept.
    if damp:
        gram = x.t() @ x
        A = gram + damp * gram.diagonal().mean() * torch.eye(20, dtype=torch.float64)
        kept = mask[2]
        shrunk = torch.linalg.solve(A[kept][:, kept], (gram @ weight[2])[kept])
        assert (new[2, kept] - shrunk).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_comes_within_a_hundredth_of_the_least(dtype: torch.dtype) -> None:
    weight, mask, x = problem(300, 96, 400)
    weight = weight.to(dtype).double()
    new = pk.masked_refit(weight.to(dtype), mask, (x.t() @ x).float(), damp=0.0)
    least, begun = errors(row_by_row(weight, mask, x, 0), weight, x), errors(weight * mask, weight, x)
    assert new.dtype == dtype
    assert new[~mask].eq(0).all()
    rounding = 0.0 if dtype == torch.float32 else 1e-3
    assert (errors(new, weight, x) <= 1.01 * least + rounding * begun).all()
    assert (least[2:] < 0.85 * begun[2:]).all()


def test_rows_with_all_or_nothing_kept() -> None:
    weight, mask, x = problem(5, 16, 50)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given = weight.to(dtype)
        new = pk.masked_refit(given, mask, (x.t() @ x).to(torch.promote_types(dtype, torch.float32)))
        assert new[0].eq(0).all()
        assert torch.equal(new[1], given[1])


@pytest.mark.parametrize("damp", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_singular_grams_and_dead_inputs(damp: float, dtype: torch.dtype) -> None:
    weight, mask, x = problem(12, 24, 10)
    x[:, [3, 8]] = 0
    mask[2:, 3] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = pk.masked_refit(weight.to(dtype), mask, (x.t() @ x).to(dtype), damp=damp)
    assert torch.equal(new[2:, 3], weight.to(dtype)[2:, 3])
    assert new[~mask].eq(0).all()
    if damp == 0:
        least, begun = errors(row_by_row(weight, mask, x, 0), weight, x), errors(weight * mask, weight, x)
        assert (errors(new, weight, x) <= least + (1e-4 if dtype == torch.float32 else 1e-9) * begun).all()
    else:
        assert new.abs().max() < 10 * weight.abs().max()
    assert torch.equal(pk.masked_refit(weight, mask, torch.zeros(24, 24)), weight * mask)


def test_no_row_is_left_worse_than_it_was() -> None:
    weight, mask, x = problem(40, 64, 70, seed=5)
    x = x * torch.logspace(-3, 3, 64, dtype=torch.float64)
    new = pk.masked_refit(weight.float(), mask, (x.t() @ x).float(), damp=0.0)
    exact = (x.t() @ x).float().double()

    def cost(given: Tensor) -> Tensor:
        missing = given.double() - weight.float().double()
        return ((missing @ exact) * missing).sum(1)

    begun = cost(weight * mask)
    assert (cost(new) <= begun * (1 + 1e-4)).all()
    assert cost(new).sum() < 0.5 * begun.sum()


def test_chunks_experts_repeats_and_arguments() -> None:
    weight, mask, x = problem(600, 12, 40)
    weight, H = weight.float(), (x.t() @ x).float()
    before = weight.clone(), mask.clone(), H.clone()
    new = pk.masked_refit(weight, mask, H)
    assert torch.equal(new, pk.masked_refit(weight, mask, H))
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, mask, H), strict=True))
    torch.testing.assert_close(new[300:], pk.masked_refit(weight[300:], mask[300:], H), rtol=1e-3, atol=1e-3)
    experts = pk.masked_refit(weight.view(2, 300, 12), mask.view(2, 300, 12), torch.stack([H, 2 * H]))
    assert torch.equal(experts[0], pk.masked_refit(weight[:300], mask[:300], H))
    assert pk.masked_refit(weight[:0], mask[:0], H).shape == (0, 12)
    assert pk.masked_refit(weight[:, :0], mask[:, :0], H[:0, :0]).shape == (600, 0)


def test_a_matrix_that_is_no_gram() -> None:
    weight, mask, _ = problem(4, 8, 10)
    slightly = torch.eye(8, dtype=torch.float64)
    slightly[2, 5] = slightly[5, 2] = 1.005
    mask[2:, 2] = mask[2:, 5] = True
    mask[2:, 0] = False
    slightly[0, 2] = slightly[2, 0] = 0.5
    slightly[0, 5] = slightly[5, 0] = -0.5
    with pytest.warns(UserWarning, match=r"negative curvature at damp=0; used damp=0\.\d"):
        new = pk.masked_refit(weight, mask, slightly, damp=0.0)
    assert new.isfinite().all()
    with pytest.raises(ValueError, match="not positive semi-definite"):
        pk.masked_refit(weight, mask, 100 * (slightly - torch.eye(8)) + torch.eye(8))


def test_bad_input() -> None:
    weight, mask, x = problem(4, 8, 10)
    H = x.t() @ x
    bad = [
        (ValueError, "The weight holds NaN", (weight.index_fill(1, torch.tensor([0]), torch.nan), mask, H)),
        (ValueError, "The H holds NaN", (weight, mask, H.index_fill(1, torch.tensor([0]), torch.inf))),
        (ValueError, "has a mask of its shape", (weight, mask[:3], H)),
        (ValueError, "damp is at least 0", (weight, mask, H, -1.0)),
        (TypeError, "the mask bool", (weight, mask.byte(), H)),
    ]
    for error, sentence, arguments in bad:
        with pytest.raises(error, match=sentence):
            pk.masked_refit(*arguments)
