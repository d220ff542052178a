"""The peers compute what they are timed for."""

from __future__ import annotations

import pytest
import torch

from bench import peers
from perp_kernels import Pattern

N, K = 12, 256


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_published_layer_is_its_formula() -> None:
    W, A, B, x, bias = normal(N, K), normal(2, K), normal(N, 2), normal(3, K), normal(N)
    W[normal(N, K, seed=1) < 0] = 0
    expected = torch.stack(
        [
            sum(x[:, k] * (W[n, k] + 2 * (W[n, k] != 0) * (B[n] @ A[:, k])) for k in range(K)) + bias[n]
            for n in range(N)
        ],
        dim=1,
    )
    torch.testing.assert_close(peers.published_masked_lora(x, W, A, B, 2.0, bias), expected)


def test_boolean_packing_comes_back() -> None:
    weight, mask = normal(N, K), normal(N, K, seed=1) > 0
    values, bits = peers.boolean_pack(weight, mask)
    assert values.tolist() == [weight[n, k].item() for n in range(N) for k in range(K) if mask[n, k]]
    assert all((bits[n, k // 8] >> k % 8 & 1) == mask[n, k] for n in range(N) for k in range(K))
    assert torch.equal(peers.boolean_unpack(values, bits), weight * mask)


@pytest.mark.parametrize("text", ["0.5", "0.3/row", "0.7/matrix", "0.6/slab", "2:4"])
def test_selection_drops_the_lowest_of_its_scope(text: str) -> None:
    scores, pattern = normal(N, 200).abs(), Pattern.parse(text)
    mask = peers.select(scores, pattern)
    scopes = {
        "matrix": [(slice(None), slice(None))],
        "slab": [(slice(None), slice(0, 128)), (slice(None), slice(128, 200))],
        "row": [(slice(n, n + 1), slice(None)) for n in range(N)],
        None: [(slice(n, n + 1), slice(k, k + 4)) for n in range(N) for k in range(0, 200, 4)],
    }
    for where in scopes["row" if text == "0.5" else pattern.scope]:
        kept, dropped = scores[where][mask[where]], scores[where][~mask[where]]
        assert len(dropped) == pattern.pruned(scores[where].numel())
        assert dropped.max() <= kept.min()


def test_gram_accumulates() -> None:
    x, H = normal(5, K).float(), torch.ones(K, K)
    torch.testing.assert_close(peers.gram(H, x), 1 + x.T @ x)


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_sparsegpt_meets_its_pattern_and_beats_zeroing(text: str) -> None:
    pattern = Pattern.parse(text)
    x = normal(600, K) @ normal(K, K, seed=1)
    x[:, 7] = 0
    weight, H = normal(N, K, seed=2), x.T @ x
    new, mask = peers.sparsegpt(weight, H, pattern)
    assert not new[~mask].any()
    assert not new[:, 7].any()
    for slab in mask.split(128, dim=1):
        assert (~slab).sum() == pattern.pruned(slab.numel())
    if pattern.is_nm:
        assert (mask.view(N, -1, 4).sum(-1) == 2).all()
    error, zeroed = (((weight - other) @ x.T).square().sum() for other in (new, weight * mask))
    assert error < 0.7 * zeroed


def test_sparsegpt_of_the_last_column_is_the_exact_least_squares_step() -> None:
    # One column of two pruned: the optimal brain surgeon's update of the other one, up to the damping.
    x = normal(50, 2)
    H, weight = x.T @ x, torch.tensor([[0.01, 1.0]], dtype=torch.float64)
    new, mask = peers.sparsegpt(weight, H, Pattern.parse("0.5"), damp=0.0)
    assert mask.tolist() == [[False, True]]
    torch.testing.assert_close(new[0, 1], weight[0, 1] + weight[0, 0] * H[0, 1] / H[1, 1])


@pytest.mark.parametrize("group", [None, 4])
def test_a_round_of_swaps_lowers_the_loss_by_the_best_pair(group: int | None) -> None:
    weight, x = normal(5, 16), normal(40, 16, seed=1)
    H, mask = x.T @ x, torch.arange(16).expand(5, 16) % 4 < 2
    before, correlation = mask.clone(), weight.masked_fill(mask, 0) @ H
    mask = mask.clone()
    peers.swap_round(weight, mask, correlation, H, group)

    def loss(row: int, kept: torch.Tensor) -> float:
        residual = weight[row].masked_fill(kept, 0)
        return float(residual @ H @ residual)

    for row in range(5):
        losses = [loss(row, before[row])]
        for u in before[row].nonzero().flatten().tolist():
            for p in (~before[row]).nonzero().flatten().tolist():
                if group is None or u // group == p // group:
                    traded = before[row].clone()
                    traded[u], traded[p] = False, True
                    losses.append(loss(row, traded))
        assert loss(row, mask[row]) == pytest.approx(min(losses))
    torch.testing.assert_close(correlation, weight.masked_fill(mask, 0) @ H)


def test_refit_solves_the_normal_equations_of_each_row() -> None:
    weight, x = normal(5, 16), normal(40, 16, seed=1)
    mask = normal(5, 16, seed=2) > 0
    new = peers.masked_refit(weight, mask, x.T @ x, 0.0)
    assert not new[~mask].any()
    assert ((weight - new) @ x.T @ x)[mask].abs().max() < 1e-9
