"""swap_round_ against the reference in float64; wanda_select against select."""

import pytest
import torch

import perp_kernels as pk
from tests.perp_kernels.oracles import normal

from .small import triton


@pytest.mark.parametrize(
    "pattern,K,dtype", [("0.6", 20, torch.float32), ("2:4", 20, torch.float32), ("1:3", 9, torch.float16)]
)
def test_swap_round(pattern: str, K: int, dtype: torch.dtype) -> None:
    x = normal(3 * K, K) @ normal(K, K, seed=1) / K**0.5
    weight, H = normal(17, K, dtype=dtype, seed=5), x.t() @ x
    begun = pk.select(weight.float().abs(), pattern)
    begun[0], begun[1] = True, False
    mask, c = begun.clone(), weight.float().masked_fill(begun, 0) @ H
    wide = weight.double(), begun.clone(), weight.double().masked_fill(begun, 0) @ H.double(), H.double()
    again = mask.clone(), c.clone()
    with triton("swap_round_"):
        gains = [pk.swap_round_(weight, mask, c, H, pattern)]
        repeated = pk.swap_round_(weight, *again, H, pattern)
        assert torch.equal(gains[0], repeated)
        assert torch.equal(mask, again[0])
        assert torch.equal(c, again[1])
        gains.append(pk.swap_round_(weight, mask, c, H, pattern))
    with pk.backend("reference"):
        expected = [pk.swap_round_(*wide, pattern) for _ in range(2)]
    assert torch.equal(mask, wide[1])
    torch.testing.assert_close(torch.stack(gains).double(), torch.stack(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(c.double(), wide[2], rtol=1e-5, atol=1e-5 * float(wide[2].abs().max()))
    assert not torch.equal(mask, begun)
    assert torch.equal(mask[:2], begun[:2])


def test_swap_round_with_the_default_configuration() -> None:
    x = normal(60, 24)
    weight, H = normal(5, 24, seed=3), x.t() @ x
    for pattern in ("0.5", "2:4"):
        mask = pk.select(weight.abs(), pattern)
        c, expected = weight.masked_fill(mask, 0) @ H, mask.clone()
        with pk.backend("triton"):
            pk.swap_round_(weight, mask, c.clone(), H, pattern)
        with pk.backend("reference"):
            pk.swap_round_(weight, expected, c, H, pattern)
        assert torch.equal(mask, expected)


def test_ties_fall_to_the_lowest_columns() -> None:
    weight = torch.tensor([[1.0, 1.0, 2.0, 2.0]]).repeat(3, 5)
    for pattern in ("0.5", "2:4"):
        mask = weight == 1.0
        with triton("swap_round_"):
            gain = pk.swap_round_(weight, mask, weight.masked_fill(mask, 0), torch.eye(20), pattern)
        assert torch.equal(gain, torch.full((3,), 3.0))
        assert torch.equal(
            (mask != (weight == 1.0)).nonzero(), torch.tensor([[r, c] for r in range(3) for c in (0, 2)])
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("pattern,K", [("2:4", 20), ("0.61", 20)])
def test_wanda_select(pattern: str, K: int, dtype: torch.dtype) -> None:
    weight, norms = (2 * normal(7, K, dtype=dtype)).round(), normal(K, seed=3).abs().mul(4).round()
    with triton("wanda_select"):
        kept = pk.wanda_select(weight, norms, pattern)
    with pk.backend("reference"):
        assert torch.equal(kept, pk.select(weight.float().abs() * norms, pattern))
    weight[6, K - 1], norms[K - 1] = torch.inf, 0.0
    with pytest.raises(ValueError, match="NaN"), triton("wanda_select"):
        pk.wanda_select(weight, norms, pattern)
