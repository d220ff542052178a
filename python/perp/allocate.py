"""How a share of zeros is spread over the blocks: alike, or by their outliers (OWL, arXiv 2310.05175)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from perp.blocks import find_blocks, prunable
from perp.errors import UserError
from perp.progress import Progress
from perp.residence import Residence, Resident
from perp.statistics import Statistics, collect
from perp_kernels import Pattern, PatternError

ALLOCATIONS = ("uniform", "owl")

# The paper's, for LLaMA: scores above M times the mean are outliers, and shares spread over twice LAMBDA.
M = 5
LAMBDA = Fraction("0.08")

_DECIMALS = 6


def check(allocation: str, pattern: Pattern) -> None:
    """Refuse what cannot be: an unknown name, N:M that OWL would have to vary, a share whose spread leaves (0, 1)."""
    if allocation not in ALLOCATIONS:
        raise UserError(f"{allocation!r} is no allocation; choose {' or '.join(ALLOCATIONS)}.")
    if allocation == "owl" and pattern.is_nm:
        raise PatternError(f'owl gives each block a share of its own, which N:M "{pattern}" has not; write a share.')
    if allocation == "owl" and not 2 * LAMBDA < pattern.sparsity < 1 - 2 * LAMBDA:
        raise PatternError(
            f'owl spreads shares over {float(2 * LAMBDA)}, which "{pattern}" leaves no room for; give a share between '
            f"{float(2 * LAMBDA)} and {float(1 - 2 * LAMBDA)}."
        )


def outlier_ratio(scores: Sequence[Tensor]) -> float:
    """The share of a block's Wanda scores, those of all its linears together, that exceed M times their mean."""
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > M * mean).sum()) for score in scores) / count


def spread(ratios: Sequence[float], weights: Sequence[int], share: Fraction) -> list[Fraction]:
    """The share of zeros of each block: more where outliers are fewer.

    ratios: the outlier ratio of each block; weights: how many it has. The kept shares are 2 LAMBDA times the ratios
    scaled to [0, 1], moved so that over all weights `share` is pruned: to less than a weight, and exactly where blocks
    are of one size.
    """
    least, most = min(ratios), max(ratios)
    if most == least:
        return [share] * len(ratios)
    kept = [2 * LAMBDA * Fraction((ratio - least) / (most - least)) for ratio in ratios]
    total = sum(weights)
    mean = sum((k * w for k, w in zip(kept, weights, strict=True)), Fraction(0)) / total
    shares: list[Fraction] = [round(share + mean - k, _DECIMALS) for k in kept]
    spent = sum((s * w for s, w in zip(shares[:-1], weights[:-1], strict=True)), Fraction(0))
    shares[-1] = round((share * total - spent) / weights[-1], 2 * _DECIMALS)
    return shares


def _scores(weight: Tensor, read: Statistics) -> Tensor:
    """Wanda's, in fp32; of the projection of several experts, each expert's by the tokens routed to it."""
    if weight.ndim > 2:
        return torch.stack([_scores(own, read.of_expert(e)) for e, own in enumerate(weight)])
    return weight.float().abs() * (read.square_sums / max(read.tokens, 1)).sqrt()


@torch.no_grad()
def owl(
    model: PreTrainedModel,
    windows: Tensor,
    pattern: Pattern,
    progress: Progress,
    residence: Residence | None = None,
    skipped: Collection[str] = (),
) -> list[Pattern]:
    """The pattern of each block of the dense model, by the Wanda scores of its linears on these windows.

    `skipped`: names of linears that do not count; of a block where none is left the pattern is never asked for.
    """
    residence = residence or Resident()
    prefix, blocks = find_blocks(model)
    calls, patterns = residence.calls(model, windows), [pattern] * len(blocks)
    ratios, weights = {}, {}
    progress.stage("outliers", len(blocks))
    for index, block in enumerate(blocks):
        with residence.enter(index):
            linears = {
                name: linear for name, linear in prunable(block, f"{prefix}.{index}").items() if name not in skipped
            }
            read = collect(block, linears, calls.hidden, partial(calls.arguments, index), "norms")
            scores = [_scores(linear.weight, read[name]) for name, linear in linears.items()]
            if scores:
                ratios[index] = outlier_ratio(scores)
                weights[index] = sum(score.numel() for score in scores)
            if index + 1 < len(blocks):
                calls.advance(index)
        progress.unit(f"{prefix}.{index}")
    progress.done()
    shares = spread([*ratios.values()], [*weights.values()], pattern.sparsity)
    for index, share in zip(ratios, shares, strict=True):
        patterns[index] = Pattern(None, None, share, pattern.scope)
    return patterns
