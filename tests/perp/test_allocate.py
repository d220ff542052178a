from fractions import Fraction

import pytest
import torch

from perp import allocate
from perp.blocks import find_blocks, prunable
from perp.errors import UserError
from perp.progress import Silent
from perp_kernels import Pattern, PatternError
from tests.perp.families import build, windows


def test_outliers_are_counted_over_the_block_as_one():
    scores = [torch.ones(10, 10), torch.cat([torch.full((6,), 40.0), torch.ones(94)]).view(10, 10)]
    # The mean of both is 2.17: 40 is above five times it. The second alone has a mean of 3.34.
    assert allocate.outlier_ratio(scores) == 6 / 200
    assert allocate.outlier_ratio([torch.full((5,), 3.0)]) == 0
    # Of the largest, twelve is above three times the mean, but not above five times.
    assert allocate.outlier_ratio([torch.cat([torch.full((2,), 12.0), torch.full((8,), 1.0)])]) == 0


def test_spread_is_the_published_formula():
    ratios, share = [0.04, 0.01, 0.02, 0.03], 0.6
    kept = torch.tensor(ratios, dtype=torch.float64)
    kept = (kept - kept.min()) / (kept.max() - kept.min()) * 2 * 0.08
    expected = 1 - (kept - kept.mean() + 1 - share)
    found = allocate.spread(ratios, [100] * 4, Fraction("0.6"))
    assert [float(s) for s in found] == pytest.approx(expected.tolist(), abs=1e-5)
    # More outliers, fewer zeros.
    assert found[0] < found[3] < found[2] < found[1]
    assert max(found) - min(found) == pytest.approx(0.16, abs=1e-5)


@pytest.mark.parametrize("share", ["0.5", "0.6", "0.37", "0.723456"])
def test_the_mean_is_kept_exactly(share):
    ratios = torch.rand(30, generator=torch.Generator().manual_seed(0)).tolist()
    shares = allocate.spread(ratios, [1000] * 30, Fraction(share))
    assert sum(shares) / 30 == Fraction(share)
    sizes = [1000 + 7 * i for i in range(30)]
    shares = allocate.spread(ratios, sizes, Fraction(share))
    assert abs(sum(s * n for s, n in zip(shares, sizes, strict=True)) - Fraction(share) * sum(sizes)) < Fraction("1e-6")
    for one in shares:
        assert Pattern.parse(str(Pattern(None, None, one, "row"))).sparsity == one


def test_blocks_alike_share_alike():
    assert allocate.spread([0.1] * 5, [10] * 5, Fraction("0.6")) == [Fraction("0.6")] * 5


def test_owl_reads_the_dense_model():
    model, ids = build("llama"), windows(4, 16)
    prefix, blocks = find_blocks(model)
    with torch.no_grad():
        # A few large weights in one block.
        blocks[1].mlp.up_proj.weight[:4, :4] = 20
    pattern = Pattern.parse("0.6/row")
    found = allocate.owl(model, ids, pattern, Silent())
    ratios, sizes = [], []
    for index, block in enumerate(blocks):
        read, hooks = {}, []
        linears = prunable(block, f"{prefix}.{index}")
        for name, linear in linears.items():
            hooks.append(
                linear.register_forward_pre_hook(
                    lambda _, a, name=name, read=read: read.setdefault(name, []).append(a[0])
                )
            )
        with torch.no_grad():
            for window in ids.split(1):
                model(window, use_cache=False)
        for hook in hooks:
            hook.remove()
        scores = torch.cat(
            [
                (linear.weight.double().abs() * torch.cat(read[name]).double().square().mean((0, 1)).sqrt()).flatten()
                for name, linear in linears.items()
            ]
        )
        ratios.append((scores > 5 * scores.mean()).double().mean().item())
        sizes.append(len(scores))
    assert ratios[0] != ratios[1]
    assert [p.sparsity for p in found] == allocate.spread(ratios, sizes, Fraction("0.6"))
    assert {p.scope for p in found} == {"row"}


def test_what_cannot_be_is_refused():
    with pytest.raises(PatternError, match='N:M "2:4" has not; write a share'):
        allocate.check("owl", Pattern.parse("2:4"))
    for share in ("0.1", "0.9"):
        with pytest.raises(PatternError, match=r"between 0\.16 and 0\.84"):
            allocate.check("owl", Pattern.parse(share))
    with pytest.raises(UserError, match="'owls' is no allocation; choose uniform or owl"):
        allocate.check("owls", Pattern.parse("0.5"))
    allocate.check("uniform", Pattern.parse("2:4"))
    allocate.check("owl", Pattern.parse("0.6"))
