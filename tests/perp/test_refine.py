import pytest
import torch

from perp.errors import UserError
from perp.refine import METHODS, RefineSettings, refine, sparsefw
from perp.refine.watch import local_error
from perp_kernels import Pattern, PatternError, select

N, K = 24, 64


def problem(pattern="0.6", tokens=600, seed=0, N=N, K=K):
    """A weight, Wanda's mask of it, and two Grams of inputs from one correlated distribution."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(K, K, generator=generator) / K**0.5 + 0.3 * torch.eye(K)
    grams = []
    for _ in range(2):
        x = torch.randn(tokens, K, generator=generator) @ mixing * torch.logspace(-0.5, 0.5, K)
        grams.append(x.T @ x)
    weight = torch.randn(N, K, generator=generator)
    parsed = Pattern.parse(pattern).with_scope("row")
    return weight, select(weight.abs() * grams[0].diagonal().sqrt(), parsed), *grams, parsed


def free(method):
    """Settings under which half of the kept weights may move, whatever the pattern."""
    return RefineSettings(method, alpha=0.5 if method == "sparsefw" else None)


def error(weight, mask, gram):
    residual = weight.double() * ~mask
    return ((residual @ gram.double()) * residual).sum().item()


def follows(mask, pattern):
    groups = mask.view(-1, pattern.m) if pattern.is_nm else mask.view(1, -1) if pattern.scope == "matrix" else mask
    return groups.sum(1).eq(groups.shape[1] - pattern.pruned(groups.shape[1])).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", ["0.6", "0.5/matrix", "2:4", "1:4"])
def test_the_error_falls_and_the_pattern_stays(method, text):
    weight, mask, gram, held_out, pattern = problem(text)
    begun = mask.clone()
    found = refine(weight, mask, gram, pattern, free(method), held_out)
    assert torch.equal(mask, begun)
    assert follows(found.mask, pattern)
    assert found.before == pytest.approx(error(weight, mask, held_out), rel=1e-4)
    assert found.after == pytest.approx(error(weight, found.mask, held_out), rel=1e-4)
    share = 0.8 if method == "sparseswaps" else 0.95
    assert error(weight, found.mask, gram) < share * error(weight, mask, gram)
    assert found.after < share * found.before
    assert found.steps > 0
    again = refine(weight, mask, gram, pattern, free(method), held_out)
    assert torch.equal(found.mask, again.mask)


def test_swaps_leave_row_counts_of_any_warm_start():
    weight, _, gram, _, _ = problem()
    mask = torch.rand(N, K, generator=torch.Generator().manual_seed(1)) < 0.4
    found = refine(weight, mask, gram, Pattern.parse("0.6/matrix"), RefineSettings())
    assert torch.equal(found.mask.sum(1), mask.sum(1))
    assert found.after < 0.5 * found.before


@pytest.mark.parametrize("text", ["0.6", "2:4"])
def test_swaps_end_where_no_pair_gains(text):
    weight, mask, gram, _, pattern = problem(text, N=4, K=24)
    # More swaps than weights are asked for; the optimum ends them.
    found = refine(weight, mask, gram, pattern, RefineSettings(steps=10_000))
    assert found.steps < 200
    for row in range(4):
        kept, pruned = found.mask[row].nonzero().flatten(), (~found.mask[row]).nonzero().flatten()
        here = error(weight[row], found.mask[row], gram)
        for u in kept.tolist():
            for p in pruned.tolist():
                if pattern.m is None or u // pattern.m == p // pattern.m:
                    other = found.mask[row].clone()
                    other[u], other[p] = False, True
                    assert error(weight[row], other, gram) > here * (1 - 1e-5)


def test_swaps_of_few_rows_are_those_of_all_rows():
    weight, mask, gram, _, pattern = problem(N=40)
    together = refine(weight, mask, gram, pattern, RefineSettings(steps=60)).mask
    alone = torch.cat(
        [refine(weight[i : i + 1], mask[i : i + 1], gram, pattern, RefineSettings(steps=60)).mask for i in range(40)]
    )
    differ = (together != alone).any(1)
    assert differ.sum() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_held_out_windows_end_what_only_fits_its_own(method):
    # Nothing carries over: the two Grams come from unlike inputs.
    weight, mask, gram, _, pattern = problem(tokens=20)
    other = problem(seed=9)[2]
    by_other = refine(weight, mask, gram, pattern, RefineSettings(method), other)
    by_itself = refine(weight, mask, gram, pattern, RefineSettings(method))
    assert by_itself.after < by_itself.before
    assert error(weight, by_other.mask, other) <= error(weight, mask, other) * (1 + 1e-6)
    assert error(weight, by_other.mask, other) <= error(weight, by_itself.mask, other) * (1 + 1e-6)
    if by_other.steps == 0:
        assert torch.equal(by_other.mask, mask)


@pytest.mark.parametrize("method", METHODS)
def test_an_optimal_start_is_given_back(method):
    weight, _, _, _, pattern = problem()
    gram = torch.diag(torch.logspace(-1, 1, K))
    mask = select(weight.abs() * gram.diagonal().sqrt(), pattern)
    found = refine(weight, mask, gram, pattern, RefineSettings(method))
    assert torch.equal(found.mask, mask)
    assert (found.steps, found.after) == (0, found.before)


@pytest.mark.parametrize("text", ["0.6", "0.6/matrix", "2:4"])
def test_alpha_of_one_gives_the_warm_start(text):
    weight, mask, gram, _, pattern = problem(text)
    found = refine(weight, mask, gram, pattern, RefineSettings("sparsefw", alpha=1.0))
    assert torch.equal(found.mask, mask)
    assert found.steps == 0


@pytest.mark.parametrize("text, alpha", [("0.6", 0.9), ("0.6/matrix", 0.9), ("2:4", 0.5)])
def test_alpha_is_the_patterns_own_unless_given(text, alpha):
    weight, mask, gram, _, pattern = problem(text)
    found, same, other = (
        refine(weight, mask, gram, pattern, RefineSettings("sparsefw", alpha=one)).mask for one in (None, alpha, 0.7)
    )
    assert torch.equal(found, same)
    assert not torch.equal(found, other)


@pytest.mark.parametrize("text,rows", [("0.6", 1), ("0.6/matrix", N)])
def test_alpha_keeps_the_highest_wanda_scores(text, rows):
    weight, mask, gram, _, pattern = problem(text)
    found = refine(weight, mask, gram, pattern, RefineSettings("sparsefw", alpha=0.5))
    scores = (weight.abs() * gram.diagonal().sqrt()).masked_fill(~mask, -1)
    for part, part_mask, part_found in zip(scores.split(rows), mask.split(rows), found.mask.split(rows), strict=True):
        highest = part.flatten().topk(int(part_mask.sum()) // 2).indices
        assert part_found.flatten()[highest].all()
    assert not torch.equal(found.mask, mask)


def relaxed_error(weight, relaxed, gram):
    residual = weight.double() * (1 - relaxed)
    return ((residual @ gram.double()) * residual).sum(1)


@pytest.mark.parametrize("text", ["0.5", "0.5/matrix", "2:4"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_one_exact_step_is_the_scalar_minimum(text, alpha, monkeypatch):
    """From the definition in float64: gradient at the whole mask, vertex, and the best step by brute force."""
    weight, mask, gram, _, pattern = problem(text)
    seen = []
    monkeypatch.setattr(sparsefw, "select", lambda scores, p: seen.append(scores.clone()) or select(scores, p))
    refine(weight, mask, gram, pattern, RefineSettings("sparsefw", steps=1, alpha=alpha))
    fixed = seen[0].isinf()
    gradient = -2 * weight.double() * (weight.double() * ~mask @ gram.double())
    torch.testing.assert_close(seen[0][~fixed].double(), -gradient[~fixed] / 2, rtol=1e-3, atol=1e-2)
    vertex = fixed | (select(seen[0], pattern) & (seen[0] > 0))
    start, end = mask.double(), vertex.double()
    grid = torch.linspace(0, 1, 20001, dtype=torch.float64)
    W, G = weight.double(), gram.double()
    residual, step = W * (1 - start), W * (end - start)
    a, b, c = ((residual @ G * residual), (residual @ G * step), (step @ G * step))
    a, b, c = (t.sum() if pattern.scope == "matrix" else t.sum(1, keepdim=True) for t in (a, b, c))
    best = grid[(a - 2 * grid * b + grid**2 * c).argmin(-1)]
    # What is rounded afterwards is M + F, with ties told apart by less than 1e-3.
    moved = seen[-1]
    size = best if best.ndim == 0 else best[:, None]
    expected = start + size * (end - start)
    assert (moved[~fixed] - expected[~fixed]).abs().max() < 1e-3


def test_the_paper_s_step_is_available():
    weight, mask, gram, _, pattern = problem()
    exact = refine(weight, mask, gram, pattern, RefineSettings("sparsefw", steps=100))
    decaying = refine(weight, mask, gram, pattern, RefineSettings("sparsefw", steps=100, step="2/(t+2)"))
    assert decaying.after < decaying.before
    assert not torch.equal(decaying.mask, exact.mask)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_dead_inputs_and_singular_grams(method, dtype):
    weight, _, _, _, pattern = problem()
    x = torch.randn(10, K, generator=torch.Generator().manual_seed(3))
    x[:, [2, 7]] = 0
    weight, gram = weight.to(dtype), x.T @ x
    mask = select(weight.float().abs() * gram.diagonal().sqrt(), pattern)
    found = refine(weight, mask, gram, pattern, free(method))
    assert follows(found.mask, pattern)
    assert found.after < 0.5 * found.before
    nothing = refine(weight, mask, torch.zeros(K, K), pattern, RefineSettings(method))
    assert torch.equal(nothing.mask, mask)


def test_local_error_is_what_the_output_loses():
    x = torch.randn(50, K, generator=torch.Generator().manual_seed(3))
    weight, mask, *_ = problem()
    expected = ((x @ (weight * mask).T) - x @ weight.T).double().square().sum().item()
    assert local_error(weight, mask, x.T @ x) == pytest.approx(expected, rel=1e-5)


def test_bad_input():
    weight, mask, gram, _, pattern = problem()
    for arguments, words in (
        ({"method": "swaps"}, "'swaps' is no way to refine a mask; choose sparseswaps or sparsefw"),
        ({"steps": 0}, "at least 1"),
        ({"held_out": 1.0}, "between 0 and 1"),
        ({"method": "sparsefw", "alpha": 1.5}, "alpha is 1.5"),
        ({"alpha": 0.5}, "alpha is of sparsefw, and masks are refined by sparseswaps"),
        ({"step": "1/t"}, "no step size"),
    ):
        with pytest.raises(UserError, match=words):
            RefineSettings(**arguments)
    with pytest.raises(UserError, match=r"masks of slabs .* .0\.6/row"):
        refine(weight, mask, gram, Pattern.parse("0.6/slab"), RefineSettings())
    with pytest.raises(PatternError, match="cannot divide"):
        refine(weight, mask, gram, Pattern.parse("2:5"), RefineSettings())
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="The Gram is NaN or infinite"):
            refine(weight, mask, gram.index_fill(0, torch.tensor([1]), bad), pattern, RefineSettings())
    assert list(RefineSettings().windows(32)) == list(range(24, 32))
    assert list(RefineSettings().windows(2)) == [1]
    for count in (0, 1):
        with pytest.raises(UserError, match="use more windows"):
            RefineSettings().windows(count)
