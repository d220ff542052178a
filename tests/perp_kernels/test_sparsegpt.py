import math
import warnings

import pytest
import torch
from torch import Tensor

from perp_kernels import Pattern, PatternError, gram_, select, sparsegpt

from .oracles import normal


def problem(N: int, K: int, dtype: torch.dtype = torch.float64, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs."""
    x = normal(tokens, K, dtype=torch.float64) @ normal(K, K, dtype=torch.float64, seed=3)
    return normal(N, K, dtype=torch.float64, seed=4).to(dtype), (x.t() @ x).to(dtype)


def one_column_at_a_time(weight: Tensor, H: Tensor, text: str, damp: float, block: int) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon from its definition: before each column the inverse of the remaining H is formed anew, and
    every remaining weight is updated at once. No lazy blocks, no factorisation."""
    pattern = Pattern.parse(text)
    N, K = weight.shape
    W, H = weight.double().clone(), H.double().clone()
    for i in range(K):
        if H[i, i] == 0:
            H[i, i], W[:, i] = 1, 0
    H += damp * H.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    U_squared = torch.stack([torch.linalg.inv(H[j:, j:])[0, 0] for j in range(K)])
    mask = torch.ones(N, K, dtype=torch.bool)
    if pattern.m is not None:
        step, choice = pattern.m, text
    else:
        step, choice = block, f"{text.partition('/')[0]}/{'row' if pattern.scope == 'row' else 'matrix'}"
    for j in range(K):
        if j % step == 0:
            columns = slice(j, j + step)
            mask[:, columns] = select(W[:, columns] ** 2 / U_squared[columns], choice)
        inverse = torch.linalg.inv(H[j:, j:])
        error = torch.where(mask[:, j], 0, W[:, j]) / inverse[0, 0]
        W[:, j:] -= error[:, None] * inverse[0]
        W[~mask[:, j], j] = 0
    return W, mask


CASES = [
    ("0.5", 8, 8),
    ("0.5", 24, 8),
    ("0.6/slab", 21, 8),
    ("0.3/row", 21, 8),
    ("2:4", 24, 8),
    ("2:4", 24, 6),
    ("3:8", 24, 4),
    ("1:5", 20, 128),
    ("1:3", 24, 1),
    ("0.5", 5, 1),
]


@pytest.mark.parametrize("text,K,block", CASES)
def test_matches_the_column_by_column_definition(text: str, K: int, block: int) -> None:
    weight, H = problem(11, K)
    new, mask = sparsegpt(weight, H, text, damp=0.02, block_size=block)
    m = Pattern.parse(text).m
    rounded = block if m is None else math.ceil(block / m) * m
    expected, expected_mask = one_column_at_a_time(weight, H, text, 0.02, rounded)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(new, expected, rtol=1e-8, atol=1e-10)
    assert new[~mask].eq(0).all()


@pytest.mark.parametrize("text", ["0.5", "0.7/row", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compensation_beats_its_own_mask(text: str, dtype: torch.dtype) -> None:
    weight, H = problem(16, 256, dtype, tokens=1000)
    new, mask = sparsegpt(weight, H, text)

    def loss(candidate: Tensor) -> float:
        difference = (candidate - weight).double()
        return float((difference @ H.double() * difference).sum())

    assert loss(new) < 0.7 * loss(weight.masked_fill(~mask, 0))


@pytest.mark.parametrize("text,scope", [("0.3", "slab"), ("0.37/row", "row"), ("3:8", "group")])
def test_counts_are_exact(text: str, scope: str) -> None:
    weight, H = problem(7, 40, torch.float32)
    _, mask = sparsegpt(weight, H, text, block_size=16)
    pattern = Pattern.parse(text)
    for slab in mask.split(16, dim=1):
        if scope == "slab":
            assert (~slab).sum() == pattern.pruned(slab.numel())
        elif scope == "row":
            assert ((~slab).sum(1) == pattern.pruned(slab.shape[1])).all()
        else:
            assert (slab.reshape(-1, 8).sum(1) == 3).all()


def test_scale_of_the_gram_does_not_matter() -> None:
    weight, H = problem(6, 24)
    new, mask = sparsegpt(weight, H, "0.5")
    scaled, scaled_mask = sparsegpt(weight, H / 1024, "0.5")
    assert torch.equal(mask, scaled_mask)
    torch.testing.assert_close(new, scaled)


def test_dead_inputs_are_zeroed_and_pruned_first() -> None:
    weight, H = problem(6, 16)
    H[[3, 7], :] = 0
    H[:, [3, 7]] = 0
    new, mask = sparsegpt(weight, H, "0.5/row", block_size=16)
    assert new[:, [3, 7]].eq(0).all()
    assert not mask[:, [3, 7]].any()
    expected, expected_mask = one_column_at_a_time(weight, H, "0.5/row", 0.01, 16)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(new, expected)
    all_dead, _ = sparsegpt(weight, torch.zeros_like(H), "0.5")
    assert all_dead.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_are_solved_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    weight, H = problem(9, 32, torch.float32)
    weight = weight.to(dtype)
    new, mask = sparsegpt(weight, H, "2:4")
    wide, wide_mask = sparsegpt(weight.float(), H, "2:4")
    assert new.dtype == dtype
    assert torch.equal(new, wide.to(dtype))
    assert torch.equal(mask, wide_mask)


@pytest.mark.parametrize("shape", [(6, 16), (1, 16), (6, 1), (0, 16)], ids=str)
def test_arguments_are_left_alone_and_results_repeat(shape: tuple[int, int]) -> None:
    weight, H = problem(*shape, torch.float32)
    kept_weight, kept_H = weight.clone(), H.clone()
    first, second = (sparsegpt(weight, H, "0.5") for _ in range(2))
    assert torch.equal(weight, kept_weight)
    assert torch.equal(H, kept_H)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[0].is_contiguous()
    assert first[1].is_contiguous()


def test_singular_gram_raises_damp_with_a_warning() -> None:
    weight = problem(4, 8)[0]
    rank_one = torch.ones(8, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"failed at damp=0; used damp=0\.01"):
        new, _ = sparsegpt(weight, rank_one, "0.5", damp=0.0)
    assert new.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sparsegpt(weight, rank_one, "0.5", damp=0.01)[0], new)


def test_experts_are_matrices() -> None:
    weight, H = problem(6, 16, torch.float32)
    weights, grams = torch.stack([weight, weight.flip(0)]), torch.stack([H, H.flip(0, 1)])
    new, mask = sparsegpt(weights, grams, "2:4")
    for expert in range(2):
        alone = sparsegpt(weights[expert], grams[expert], "2:4")
        assert torch.equal(new[expert], alone[0])
        assert torch.equal(mask[expert], alone[1])


def test_arrays_are_accepted() -> None:
    weight, H = problem(6, 16, torch.float32)
    assert torch.equal(sparsegpt(weight.numpy(), H.numpy(), "2:4")[0], sparsegpt(weight, H, "2:4")[0])


def test_takes_what_gram_gives() -> None:
    x, weight = normal(50, 16, dtype=torch.bfloat16), normal(6, 16, dtype=torch.bfloat16)
    new, mask = sparsegpt(weight, gram_(torch.zeros(16, 16), x), "2:4")
    assert torch.equal(new != 0, mask)


def test_bad_input() -> None:
    weight, H = problem(4, 8)
    with pytest.raises(PatternError, match=r'cannot rank a matrix as "0\.5/matrix" asks: write "0\.5"'):
        sparsegpt(weight, H, "0.5/matrix")
    with pytest.raises(PatternError, match="has 8 inputs"):
        sparsegpt(weight, H, "1:3")
    with pytest.raises(ValueError, match="weight holds NaN"):
        sparsegpt(weight.index_fill(1, torch.tensor([0]), torch.nan), H, "0.5")
    with pytest.raises(ValueError, match="H holds NaN"):
        sparsegpt(weight, H.index_fill(1, torch.tensor([0]), torch.inf), "0.5")
    with pytest.raises(ValueError, match="not positive semi-definite"):
        sparsegpt(weight, -H, "0.5")
    with pytest.raises(ValueError, match="differ"):
        sparsegpt(weight, H[:4, :4], "0.5")
    with pytest.raises(ValueError, match="damp is at least 0"):
        sparsegpt(weight, H, "0.5", damp=-1)
    with pytest.raises(TypeError, match="floating point"):
        sparsegpt(weight.int(), H, "0.5")
