import numpy as np
import pytest
import torch
from torch import Tensor

from perp_kernels import Pattern, select


def by_stable_sort(scores: Tensor, pruned: int) -> Tensor:
    """The definition: a stable ascending sort of the flattened scores, the first `pruned` go."""
    order = np.argsort(scores.double().numpy().ravel(), kind="stable")
    mask = np.ones(scores.numel(), dtype=bool)
    mask[order[:pruned]] = False
    return torch.from_numpy(mask).view(scores.shape)


def oracle(scores: Tensor, text: str) -> Tensor:
    pattern = Pattern.parse(text)
    N, K = scores.shape
    if pattern.m is not None:
        pieces = [(slice(i, i + 1), slice(j, j + pattern.m)) for i in range(N) for j in range(0, K, pattern.m)]
    elif pattern.scope == "matrix":
        pieces = [(slice(None), slice(None))]
    elif pattern.scope == "slab":
        pieces = [(slice(None), slice(j, j + 128)) for j in range(0, K, 128)]
    else:
        pieces = [(slice(i, i + 1), slice(None)) for i in range(N)]
    mask = torch.empty(N, K, dtype=torch.bool)
    for rows, columns in pieces:
        piece = scores[rows, columns]
        mask[rows, columns] = by_stable_sort(piece, pattern.pruned(piece.numel()))
    return mask


@pytest.mark.parametrize("text", ["0.6", "0.6/row", "0.35/matrix", "0.5/slab", "2:4", "1:4", "3:8", "0.001"])
@pytest.mark.parametrize("shape", [(1, 8), (7, 24), (5, 264), (16, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_matches_the_definition(text: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(select(scores, text), oracle(scores, text))


@pytest.mark.parametrize("text", ["0.6", "0.35/matrix", "0.5/slab", "2:4", "3:8"])
def test_ties_fall_to_the_lower_column(text: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 3, (9, 136), generator=generator).float()
    scores[3] = 1.0
    scores[4, ::2] = -0.0
    assert torch.equal(select(scores, text), oracle(scores, text))


def test_infinite_scores_rank() -> None:
    scores = torch.tensor([[1.0, float("inf"), -float("inf"), float("inf")]])
    assert select(scores, "0.5").tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("text", ["0.5", "0.5/matrix", "0.5/slab", "2:4"])
def test_empty(shape: tuple[int, ...], text: str) -> None:
    assert select(torch.empty(shape), text).shape == shape


def test_experts_are_matrices() -> None:
    scores = torch.rand(3, 6, 16)
    for text in ("0.4/matrix", "0.4", "0.4/slab", "2:4"):
        assert torch.equal(select(scores, text), torch.stack([select(matrix, text) for matrix in scores]))


def test_strides_do_not_matter() -> None:
    scores = torch.rand(16, 6).t()
    assert torch.equal(select(scores, "0.5"), select(scores.contiguous(), "0.5"))


def test_arrays_are_accepted() -> None:
    scores = np.random.default_rng(0).random((4, 8))
    assert torch.equal(select(scores, "2:4"), select(torch.from_numpy(scores), "2:4"))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="NaN"):
        select(torch.tensor([[1.0, float("nan")]]), "0.5")
    with pytest.raises(ValueError, match="scores has 6 inputs"):
        select(torch.rand(2, 6), "2:4")
    with pytest.raises(ValueError, match="floating point"):
        select(torch.ones(2, 4, dtype=torch.int64), "0.5")
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        select(torch.rand(4), "0.5")
    with pytest.raises(TypeError, match="__dlpack__"):
        select([[0.5]], "0.5")
