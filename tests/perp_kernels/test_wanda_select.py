"""wanda_select against select on the scores in full, on every implementation of the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import perp_kernels as pk

from .native import SERVERS, serve
from .oracles import normal

PATTERNS = ("0.5", "0.97/row", "0.001", "0.35/matrix", "0.5/slab", "2:4", "1:2", "5:8", "3:5", "40:80")


@pytest.fixture(params=SERVERS)
def served(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from serve(request.param)


def inputs(N: int, K: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight of few values, so that scores tie, and norms some of which are zero or infinite products away."""
    weight = (2 * normal(N, K, seed=seed)).round().to(dtype)
    weight[:, ::7] = -0.0
    norms = normal(K, seed=seed + 1).abs().mul(4).round().div(4)
    return weight, norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_select_of_the_scores(served: str, pattern: str, dtype: torch.dtype) -> None:
    for N, K in ((7, 240), (1, 80), (3, 400), (0, 80), (3, 0)):
        for weight, norms in (inputs(N, K, dtype), (normal(N, K, dtype=dtype), normal(K, seed=8).abs())):
            scores = weight.float().abs() * norms
            with pk.dispatch.served():
                found = pk.wanda_select(weight, norms, pattern)
            with pk.backend("reference"):
                assert torch.equal(found, pk.select(scores, pattern))


def test_norms_decide() -> None:
    weight, norms = torch.tensor([[3.0, -2.0, 1.0, -4.0]]), torch.tensor([1.0, 2.0, 5.0, 0.1])
    assert pk.wanda_select(weight, norms, "2:4").tolist() == [[False, True, True, False]]
    assert pk.select(weight.abs(), "2:4").tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "0.5/matrix", "3:5"])
def test_scores_that_have_no_rank_are_refused(served: str, pattern: str) -> None:
    for value, norm in ((torch.nan, 1.0), (1.0, torch.nan), (torch.inf, 0.0)):
        weight, norms = torch.ones(9, 40), torch.ones(40)
        weight[8, 37], norms[37] = value, norm
        with pytest.raises(ValueError, match="Scores hold NaN"):
            pk.wanda_select(weight, norms, pattern)
    weight, norms = torch.ones(2, 40), torch.ones(40)
    weight[1, 3] = -torch.inf
    assert pk.wanda_select(weight, norms, pattern)[1, 3]


def test_experts_are_matrices_and_strides_do_not_matter() -> None:
    weight, norms = normal(3, 6, 16), normal(3, 16, seed=4).abs()
    mask = pk.wanda_select(weight, norms, "0.4")
    for expert in range(3):
        assert torch.equal(mask[expert], pk.wanda_select(weight[expert], norms[expert], "0.4"))
    turned = weight[0].t().contiguous().t()
    assert torch.equal(pk.wanda_select(turned, norms[0], "0.4"), mask[0])
    assert pk.wanda_select(weight[:0], norms[:0], "2:4").shape == (0, 6, 16)


def test_float64_is_ranked_in_float64() -> None:
    weight = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64).flip(1)
    assert pk.wanda_select(weight, torch.ones(2, dtype=torch.float64), "0.5").tolist() == [[True, False]]


def test_bad_input() -> None:
    weight, norms = normal(4, 8), normal(8).abs()
    with pytest.raises(ValueError, match="has norms"):
        pk.wanda_select(weight, norms[:4], "0.5")
    with pytest.raises(TypeError, match="Norms are float32"):
        pk.wanda_select(weight, norms.double(), "0.5")
    with pytest.raises(pk.PatternError, match="cannot divide"):
        pk.wanda_select(weight, norms, "1:3")
