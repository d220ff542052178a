import pytest
import torch

from perp import pruners
from perp.errors import UserError
from perp.statistics import Statistics
from perp_kernels import Pattern, PatternError

N, K, TOKENS = 24, 160, 300


def sample(dtype=torch.float32, seed=0):
    """A weight [N, K] and inputs [samples, TOKENS, K] with columns of very different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator).to(dtype)
    x = (
        torch.randn(4, TOKENS, K, generator=generator)
        * torch.logspace(-2, 2, K)[torch.randperm(K, generator=generator)]
    )
    return weight, x


def of_kind(kind, x):
    statistics = Statistics(torch.zeros((K,) if kind == "norms" else (K, K)))
    for window in x:
        statistics.add(window)
    return statistics


def kept_by_definition(scores, pattern, scope):
    """The mask by a stable sort within each group, one group after the other, in the scores' own precision."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    if pattern.is_nm:
        groups = [(slice(i, i + 1), slice(j, j + pattern.m)) for i in range(N) for j in range(0, K, pattern.m)]
    elif scope == "row":
        groups = [(slice(i, i + 1), slice(None)) for i in range(N)]
    elif scope == "slab":
        groups = [(slice(None), slice(j, j + 128)) for j in range(0, K, 128)]
    else:
        groups = [(slice(None), slice(None))]
    for rows, columns in groups:
        group = scores[rows, columns]
        lowest = group.flatten().sort(stable=True).indices[: int(pattern.sparsity * group.numel())]
        chosen = torch.ones(group.numel(), dtype=torch.bool)
        chosen[lowest] = False
        mask[rows, columns] = chosen.view(group.shape)
    return mask


@pytest.mark.parametrize("text", ["0.5", "0.6/row", "0.37/slab", "2:4", "1:8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_magnitude(text, dtype):
    weight, _ = sample(dtype)
    pattern = Pattern.parse(text)
    pruned, mask = pruners.get("magnitude").prune(weight, None, pattern)
    expected = kept_by_definition(weight.double().abs(), pattern, pattern.scope or "matrix")
    assert torch.equal(mask, expected)
    assert pruned.dtype == dtype
    assert torch.equal(pruned, torch.where(expected, weight, torch.zeros((), dtype=dtype)))


@pytest.mark.parametrize("text", ["0.5", "0.6/matrix", "0.37/slab", "2:4", "4:8"])
@pytest.mark.parametrize("kind", ["norms", "gram"])
def test_wanda_is_the_reference_metric(text, kind):
    weight, x = sample()
    pattern = Pattern.parse(text)
    pruned, mask = pruners.get("wanda").prune(weight, of_kind(kind, x), pattern)
    metric = weight.double().abs() * x.double().square().sum(1).mean(0).sqrt()
    expected = kept_by_definition(metric, pattern, pattern.scope or "row")
    assert torch.equal(mask, expected)
    assert torch.equal(pruned, weight * expected)


@pytest.mark.parametrize("text", ["0.5", "0.6/matrix", "0.37/slab", "2:4", "4:8"])
@pytest.mark.parametrize("kind", ["norms", "gram"])
def test_ria_is_its_definition_and_none_of_its_neighbours(text, kind):
    weight, x = sample()
    weight *= torch.logspace(-1, 1, N)[:, None]
    pattern = Pattern.parse(text)
    _, mask = pruners.get("ria").prune(weight, of_kind(kind, x), pattern)
    size, norms = weight.double().abs(), x.double().square().sum((0, 1)).sqrt()
    of_column, of_row = size / size.sum(0), size / size.sum(1, keepdim=True)

    def kept(scores, scope=pattern.scope or "row"):
        return kept_by_definition(scores, pattern, scope)

    assert torch.equal(mask, kept((of_column + of_row) * norms**0.5))
    assert not torch.equal(mask, kept((of_column + of_row) * norms))
    assert not torch.equal(mask, kept(size * norms))
    if not pattern.is_nm:
        assert not torch.equal(mask, kept(of_row * norms**0.5))
        others = {"row": "matrix", "matrix": "row", "slab": "matrix"}
        assert not torch.equal(mask, kept((of_column + of_row) * norms**0.5, others[pattern.scope or "row"]))


def test_ria_of_rows_and_columns_of_zeros():
    weight, x = sample()
    weight[3], weight[:, 5] = 0, 0
    _, mask = pruners.get("ria").prune(weight, of_kind("norms", x), Pattern.parse("0.5"))
    assert mask.sum(1).eq(K // 2).all()
    assert not mask[:3, 5].any()


def test_wanda_per_matrix_is_not_wanda_per_row():
    weight, x = sample()
    weight *= torch.logspace(-1, 1, N)[:, None]
    masks = [
        pruners.get("wanda").prune(weight, of_kind("norms", x), Pattern.parse(f"0.5/{s}"))[1] for s in ("row", "matrix")
    ]
    assert masks[0].sum() == masks[1].sum()
    assert masks[0].sum(1).eq(K // 2).all()
    assert masks[1].sum(1).min() < K // 3 < 2 * K // 3 < masks[1].sum(1).max()


@pytest.mark.parametrize("text", ["0.5", "0.5/row", "2:4"])
def test_sparsegpt_compensates(text):
    weight, x = sample()
    pattern = Pattern.parse(text)
    statistics = of_kind("gram", x)
    pruned, mask = pruners.get("sparsegpt").prune(weight, statistics, pattern)
    assert not pruned[~mask].any()
    scope = pattern.scope or "slab"
    for counts in {"row": mask.sum(1), "slab": torch.stack([s.sum() for s in mask.split(128, 1)])}[scope]:
        assert counts.item() in {int(n * (1 - pattern.sparsity)) for n in (K, N * 128, N * (K - 128))}
    gram = torch.einsum("stk,stl->kl", x.double(), x.double())

    def error(other):
        difference = weight.double() - other.double()
        return torch.einsum("nk,kl,nl->", difference, gram, difference)

    assert error(pruned) < error(weight * mask)


@pytest.mark.parametrize("method", pruners.METHODS)
def test_a_kept_zero_counts_as_kept(method):
    weight, x = sample()
    weight[:, ::2] = 0
    pattern = Pattern.parse("0.25")
    _, mask = pruners.get(method).prune(weight, of_kind("gram", x), pattern)
    assert mask.sum() == N * K * 3 // 4
    assert (mask & (weight == 0)).any()


@pytest.mark.parametrize("method", pruners.METHODS)
def test_bfloat16_stays_bfloat16_and_repeats(method):
    weight, x = sample(torch.bfloat16)
    statistics = of_kind("gram", x)
    before = statistics.sums.clone()
    once = pruners.get(method).prune(weight, statistics, Pattern.parse("2:4"))
    again = pruners.get(method).prune(weight, statistics, Pattern.parse("2:4"))
    assert once[0].dtype == torch.bfloat16
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])
    assert torch.equal(statistics.sums, before)


def test_an_unknown_method_is_refused():
    with pytest.raises(
        UserError, match="'wander' is not a pruning method; choose one of magnitude, wanda, ria, sparsegpt"
    ):
        pruners.get("wander")


def test_resolve_fills_the_scope_and_refuses_one_that_cannot_be():
    scopes = {name: pruners.resolve(name, "0.5")[1].scope for name in pruners.METHODS}
    assert scopes == {"magnitude": "matrix", "wanda": "row", "ria": "row", "sparsegpt": "slab"}
    assert str(pruners.resolve("magnitude", "0.5/row")[1]) == "0.5/row"
    assert str(pruners.resolve("wanda", "2:4")[1]) == "2:4"
    with pytest.raises(PatternError, match=r'sparsegpt cannot prune "0\.6/matrix"; write 0\.6/slab or 0\.6/row'):
        pruners.resolve("sparsegpt", "0.6/matrix")


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt"])
def test_missing_statistics_are_refused(method):
    with pytest.raises(ValueError, match=f"{method} needs"):
        pruners.get(method).prune(sample()[0], None, Pattern.parse("0.5"))
