"""select and sparsegpt against their definitions."""

import pytest
import torch

import perp_kernels as pk
from tests.perp_kernels.oracles import DEVICE, normal

from .small import DTYPES, LAUNCHED, triton

WIDE = [("2:4", 5000), ("0.5", 14336), ("0.61/row", 5001)] if LAUNCHED else []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern,K", [("2:4", 20), ("1:3", 9), ("5:8", 16), ("0.5", 20), ("0.61/row", 33), *WIDE])
def test_select(pattern: str, K: int, dtype: torch.dtype) -> None:
    # Rounded, so that many are equal; of both signs, with both zeros and both infinities.
    scores = (2 * normal(7, K, dtype=dtype)).round()
    scores[0], scores[1, 0], scores[2, 1], scores[3] = 0.0, torch.inf, -torch.inf, -0.0
    scores[4, ::2] = -0.0
    with triton("select"):
        kept = pk.select(scores, pattern)
    parsed = pk.Pattern.parse(pattern)
    width = parsed.m or K
    rows = scores.double().view(-1, width)
    order = rows.argsort(dim=1, stable=True)
    expected = torch.ones(rows.shape, dtype=torch.bool, device=DEVICE)
    expected.scatter_(1, order[:, : parsed.pruned(width)], False)
    assert torch.equal(kept, expected.view(scores.shape))


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("where", [(0, 0), (4, 39)])
def test_select_has_no_rank_for_nan(pattern: str, where: tuple[int, int]) -> None:
    scores = normal(5, 40)
    scores[where] = torch.nan
    with pytest.raises(ValueError, match="NaN"), triton("select"):
        pk.select(scores, pattern)


def test_other_scopes_are_left_to_the_reference() -> None:
    with pytest.raises(ValueError, match="No triton implementation"), pk.backend("triton"):
        pk.select(normal(2, 4), "0.5/matrix")


@pytest.mark.parametrize("pattern,block_size", [("2:4", 7), ("1:3", 12), ("0.5", 5), ("0.5/row", 128)])
def test_sparsegpt(pattern: str, block_size: int) -> None:
    K = 12
    weight, x = normal(17, K), normal(100, K, seed=5)
    x[:, 3] = 0
    with triton("sparsegpt", "sparsegpt_block_"):
        got, kept = pk.sparsegpt(weight, x.t() @ x, pattern, block_size=block_size)
        again, _ = pk.sparsegpt(weight, x.t() @ x, pattern, block_size=block_size)
    wide = x.double()
    with pk.backend("reference"):
        exact, expected = pk.sparsegpt(weight.double(), wide.t() @ wide, pattern, block_size=block_size)
        plain, _ = pk.sparsegpt(weight, x.t() @ x, pattern, block_size=block_size)
    assert torch.equal(kept, expected)
    assert torch.equal(got, again)
    assert not bool(got[~kept].any())
    error, error_of_plain = ((t.double() - exact).abs().max() for t in (got, plain))
    assert error <= 3 * error_of_plain


def test_sparsegpt_of_half_precision() -> None:
    weight, x = normal(5, 16, dtype=torch.float16), normal(50, 16, seed=5)
    with triton("sparsegpt", "sparsegpt_block_"):
        got, kept = pk.sparsegpt(weight, x.t() @ x, "2:4")
    with pk.backend("reference"):
        exact, expected = pk.sparsegpt(weight.double(), (x.t() @ x).double(), "2:4")
    assert torch.equal(kept, expected)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-3)
