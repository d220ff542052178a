"""swap_round_ against all pairs tried one by one in float64, on every implementation of the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import perp_kernels as pk
from perp_kernels import cpu
from perp_kernels.cpu import native

from .native import SERVERS, serve
from .oracles import normal


@pytest.fixture(params=SERVERS)
def served(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from serve(request.param)


def problem(N: int, K: int, pattern: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its Wanda mask and the Gram of correlated inputs."""
    x = normal(2 * K, K, seed=seed) @ normal(K, K, seed=seed + 1) / K**0.5
    weight, H = normal(N, K, seed=seed + 2), x.t() @ x
    return weight, pk.select(weight.abs() * H.diagonal().sqrt(), pattern), H


def correlation_of(weight: Tensor, mask: Tensor, H: Tensor) -> Tensor:
    return (weight.masked_fill(mask, 0) @ H.to(weight.dtype)).contiguous()


def losses(weight: Tensor, mask: Tensor, H: Tensor) -> Tensor:
    residual = weight.double().masked_fill(mask, 0)
    return ((residual @ H.double()) * residual).sum(1)


def best_pairs(weight: Tensor, mask: Tensor, H: Tensor, group: int) -> list[tuple[float, int, int]]:
    """(change of the loss, u, p) of each row: every pair is traded, and the loss measured."""
    found = []
    for w, kept in zip(weight, mask, strict=True):
        pairs = torch.cartesian_prod(kept.nonzero().flatten(), (~kept).nonzero().flatten())
        pairs = pairs[pairs[:, 0] // group == pairs[:, 1] // group]
        after, row = kept.repeat(len(pairs), 1), torch.arange(len(pairs))
        after[row, pairs[:, 0]], after[row, pairs[:, 1]] = False, True
        changes = losses(w[None], after, H) - losses(w[None], kept[None], H)
        least = int(changes.argmin())
        found.append((changes[least].item(), *pairs[least].tolist()) if changes[least] < 0 else (0.0, -1, -1))
    return found


def swap(weight: Tensor, mask: Tensor, H: Tensor, pattern: str, rounds: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(mask, correlation, gains [rounds, N]) after some rounds."""
    mask, correlation = mask.clone(), correlation_of(weight.to(H.dtype), mask, H)
    gains = [pk.swap_round_(weight, mask, correlation, H, pattern) for _ in range(rounds)]
    return mask, correlation, torch.stack(gains)


@pytest.mark.parametrize(
    "pattern,shape", [("0.6", (7, 20)), ("0.5/matrix", (5, 18)), ("2:4", (6, 20)), ("3:5", (5, 20))]
)
def test_trades_the_best_of_all_pairs(served: str, pattern: str, shape: tuple[int, int]) -> None:
    weight, mask, H = problem(*shape, pattern)
    expected = best_pairs(weight, mask, H, pk.Pattern.parse(pattern).m or shape[1])
    after, correlation, (gain,) = swap(weight, mask, H, pattern)
    for row, (change, u, p) in enumerate(expected):
        changed = (after[row] != mask[row]).nonzero().flatten().tolist()
        assert changed == sorted(place for place in (u, p) if place >= 0)
        assert gain[row].item() == pytest.approx(-change, rel=1e-5)
    assert any(u >= 0 for _, u, _ in expected)
    plain = correlation_of(weight, after, H)
    exact = correlation_of(weight.double(), after, H)
    error = (correlation - exact).abs().max()
    assert error <= 4 * max((plain - exact).abs().max(), torch.finfo(torch.float32).eps * exact.abs().max())


def test_a_pair_chosen_apart_would_lose(served: str) -> None:
    """On equal inputs the loss is (sum of the pruned weights)^2. The best weight to prune alone, -9, and the best to
    revive alone, 10, are together worse than no trade: 81 becomes 100. The best pair leaves 1."""
    weight, H = torch.tensor([[-9.0, 10.0, -1.0, 9.0]]), torch.ones(4, 4)
    mask = torch.tensor([[True, False, False, True]])
    apart = torch.tensor([[False, True, False, True]])
    assert losses(weight, mask, H).item() == 81
    assert losses(weight, apart, H).item() == 100
    after, _, (gain,) = swap(weight, mask, H, "0.5")
    assert after.tolist() == [[False, False, True, True]]
    assert losses(weight, after, H).item() == 1
    assert gain.item() == 80


@pytest.mark.parametrize("pattern", ["0.6", "2:4", "1:8"])
def test_the_exact_loss_falls_to_an_optimum(served: str, pattern: str) -> None:
    weight, mask, H = problem(33, 72, pattern)
    correlation, before = correlation_of(weight, mask, H), losses(weight, mask, H)
    counts = mask.sum(1)
    for _ in range(400):
        gain = pk.swap_round_(weight, mask, correlation, H, pattern)
        after = losses(weight, mask, H)
        assert (after[gain > 0] < before[gain > 0]).all()
        assert torch.equal(after[gain == 0], before[gain == 0])
        torch.testing.assert_close(before - after, gain.double(), rtol=1e-5, atol=1e-9 * float(before.max()))
        before = after
        if not gain.any():
            break
    assert not gain.any()
    assert torch.equal(mask.sum(1), counts)
    if ":" in pattern:
        kept, m = map(int, pattern.split(":"))
        assert (mask.view(-1, m).sum(1) == kept).all()
    optimum = best_pairs(weight[:4], mask[:4], H, pk.Pattern.parse(pattern).m or 72)
    assert all(change > -1e-5 * float(before.max()) for change, _, _ in optimum)


def test_a_stale_correlation_cannot_raise_the_loss(served: str) -> None:
    weight, mask, H = problem(20, 48, "0.5")
    correlation = normal(20, 48, seed=9) * correlation_of(weight, mask, H).abs().max()
    before = losses(weight, mask, H)
    gain = pk.swap_round_(weight, mask, correlation, H, "0.5")
    after = losses(weight, mask, H)
    torch.testing.assert_close(before - after, gain.double(), rtol=1e-5, atol=1e-9 * float(before.max()))
    assert (after <= before).all()


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_ties_fall_to_the_lowest_columns(served: str, pattern: str) -> None:
    """Equal weights and a Gram of one value: kept weights are all alike, and so are pruned ones."""
    weight = torch.tensor([[1.0, 1.0, 2.0, 2.0]]).repeat(3, 6)
    mask = weight == 1.0
    H = torch.eye(24)
    after, _, (gain,) = swap(weight, mask, H, pattern)
    assert torch.equal(gain, torch.full((3,), 3.0))
    assert torch.equal((after != mask).nonzero(), torch.tensor([[r, c] for r in range(3) for c in (0, 2)]))


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_rows_without_a_pair_gain_nothing(served: str, pattern: str) -> None:
    weight, mask, H = problem(4, 24, pattern)
    mask[0], mask[1] = True, False
    weight[2, 3] = torch.nan
    correlation = correlation_of(weight, mask, H)
    before = mask.clone()
    gain = pk.swap_round_(weight, mask, correlation, H, pattern)
    assert torch.equal(gain[:2], torch.zeros(2))
    assert torch.equal(mask[:2], before[:2])
    assert gain.isfinite().all()
    assert mask[2, 3] == before[2, 3]
    for shape in ((0, 24), (3, 0)):
        none = torch.empty(shape), torch.empty(shape, dtype=torch.bool), torch.empty(shape)
        gain = pk.swap_round_(*none, torch.eye(shape[1]), pattern)
        assert torch.equal(gain, torch.zeros(shape[0]))


@pytest.mark.parametrize("pattern", ["0.6", "2:4"])
@pytest.mark.parametrize("K", [60, 1300])
def test_implementations_agree_and_results_repeat(pattern: str, K: int) -> None:
    weight, mask, H = problem(40, K, pattern)
    with pk.backend("reference"):
        expected = swap(weight, mask, H, pattern, rounds=2)
    threads, results = torch.get_num_threads(), []
    for count in (1, 4, 3):
        torch.set_num_threads(count)
        results.append(swap(weight, mask, H, pattern, rounds=2))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(results[0][0], expected[0])
    torch.testing.assert_close(results[0][2], expected[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    weight, mask, H = problem(9, 24, "0.5")
    weight = weight.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = swap(weight, mask, H.to(wide), "0.5", rounds=2)
    same = swap(weight.to(wide), mask, H.to(wide), "0.5", rounds=2)
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
    assert found[2].dtype == wide


def test_experts_are_matrices() -> None:
    parts = [problem(5, 16, "2:4", seed) for seed in (0, 7)]
    weight, mask, H = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    correlation = torch.stack([correlation_of(*part) for part in parts])
    gain = pk.swap_round_(weight, mask, correlation, H, "2:4")
    for expert, part in enumerate(parts):
        alone = swap(*part, "2:4")
        assert torch.equal(mask[expert], alone[0])
        assert torch.equal(correlation[expert], alone[1])
        assert torch.equal(gain[expert], alone[2][0])


def test_memory_of_the_reference_is_bounded() -> None:
    weight, mask, H = problem(64, 512, "0.5")
    correlation = correlation_of(weight, mask, H)
    with pk.backend("reference"), torch.profiler.profile(profile_memory=True) as profile:
        pk.swap_round_(weight, mask, correlation, H, "0.5")
    largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert largest <= 4 * (1 << 22) + 4096 < 4 * 64 * 512 * 512


def test_bad_input() -> None:
    weight, mask, H = problem(4, 8, "0.5")
    c = correlation_of(weight, mask, H)
    bad = [
        (TypeError, "float64 for a weight in float64", (weight.double(), mask, c, H, "0.5")),
        (TypeError, "The mask is bool, not torch.uint8", (weight, mask.byte(), c, H, "0.5")),
        (ValueError, "differ", (weight, mask, c, H[:4, :4], "0.5")),
        (ValueError, r"The mask is contiguous \[4, 8\]", (weight, mask[:3], c, H, "0.5")),
        (ValueError, "The correlation is contiguous", (weight, mask, c.t().contiguous().t(), H, "0.5")),
        (pk.PatternError, "cannot divide", (weight, mask, c, H, "1:3")),
        (pk.PatternError, 'slab has no pairs of its own, .* write "0.5"', (weight, mask, c, H, "0.5/slab")),
    ]
    for error, sentence, arguments in bad:
        with pytest.raises(error, match=sentence):
            pk.swap_round_(*arguments)


@pytest.mark.skipif(not cpu.available, reason=cpu.why)
def test_bad_views_are_refused() -> None:
    extension, view = native.extension(), native.view
    W, kept, H, gain = normal(4, 8), torch.zeros(4, 8, dtype=torch.uint8), torch.eye(8), torch.empty(4)
    bad = [
        ("weight is float64, expected float32", W.double(), kept, W, H, gain),
        (r"kept has shape \[4, 7\], expected \[4, 8\]", W, kept[:, :7], W, H, gain),
        (r"correlation has shape \[3, 8\]", W, kept, W[:3], H, gain),
        (r"H has shape \[7, 7\], expected \[8, 8\]", W, kept, W, H[1:, 1:], gain),
        ("weight must have stride 1", normal(8, 4).t(), kept, W, H, gain),
        ("correlation has rows that overlap", W, kept, W[:1].expand(4, 8), H, gain),
        (r"gain has shape \[3\]", W, kept, W, H, gain[:3]),
    ]
    for sentence, *tensors in bad:
        views = [view("tensor", tensor) for tensor in tensors]
        with pytest.raises(ValueError, match=sentence):
            extension.swap_round(*views[:4], 8, views[4])
    views = [view("tensor", tensor) for tensor in (W, kept, W.clone(), H, gain)]
    for group in (0, 3):
        with pytest.raises(ValueError, match=f"do not divide into groups of {group}"):
            extension.swap_round(*views[:4], group, views[4])


@pytest.mark.skipif(not cpu.available, reason=cpu.why)
def test_views_need_not_be_contiguous() -> None:
    weight, mask, H = problem(5, 20, "0.5")
    c = correlation_of(weight, mask, H)
    expected = mask.clone(), c.clone()
    pk.swap_round_(weight, *expected, H, "0.5")
    wide = torch.full((5, 23), torch.nan), torch.full((5, 23), 7, dtype=torch.uint8), torch.full((5, 23), torch.nan)
    for tensor, part in zip(wide, (weight, mask, c), strict=True):
        tensor[:, :20] = part
    H_wide, gain = torch.full((20, 21), torch.nan), torch.empty(5)
    H_wide[:, :20] = H
    views = [native.view("tensor", tensor[:, :20]) for tensor in (*wide, H_wide)]
    native.extension().swap_round(*views, 20, native.view("gain", gain))
    assert torch.equal(wide[1][:, :20].bool(), expected[0])
    assert torch.equal(wide[2][:, :20], expected[1])
    assert wide[1][:, 20:].eq(7).all()
    assert all(tensor[:, 20:].isnan().all() for tensor in (wide[0], wide[2]))
