"""Iterative pruning: to the pattern in several cycles, each pruning a little and retraining (IMP, Han et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from torch import Tensor

from perp.adapters import merge
from perp.distil import Teacher
from perp.errors import UserError
from perp.finished import Finished
from perp.linear import swap_linears, unswap
from perp.modes import MODES
from perp.parts import adapter_mode
from perp.progress import Progress
from perp.prune import Pruned, prune_model
from perp.reconstruct import ReconstructSettings
from perp.residence import Recorded
from perp.retrain import RetrainSettings, retrain
from perp_kernels import Pattern

SCHEDULES = ("geometric", "linear")


def schedule(pattern: str | Pattern, cycles: int, kind: str = "geometric") -> list[Pattern]:
    """The pattern of each cycle, the last being `pattern` itself.

    After cycle c of n the share kept is d^(c/n), d that of `pattern` ("geometric": each cycle prunes the same share of
    what is left), or 1 - (1 - d) c/n ("linear"). Of N:M, M stays and N is that share of it, rounded; UserError where
    two cycles would have the same.
    """
    pattern = Pattern.parse(pattern)
    if kind not in SCHEDULES:
        raise UserError(f"{kind!r} is not a schedule; choose {' or '.join(SCHEDULES)}.")
    if cycles < 1:
        raise UserError(f"the number of cycles is {cycles}; it must be at least 1.")
    kept = 1 - float(pattern.sparsity)
    shares = [kept ** (c / cycles) if kind == "geometric" else 1 - (1 - kept) * c / cycles for c in range(1, cycles)]
    if pattern.m is None:
        # Four decimals: a pattern is a decimal fraction, and a ten-thousandth of a matrix is nobody's concern.
        found = [
            Pattern(None, None, Fraction(round(1 - share, 4)).limit_denominator(10_000), pattern.scope)
            for share in shares
        ]
    else:
        m = pattern.m
        found = [Pattern(n, m, Fraction(m - n, m)) for n in (round(m * share) for share in shares) if n < m]
    found.append(pattern)
    if len({one.sparsity for one in found}) < cycles or any(one.sparsity > pattern.sparsity for one in found):
        raise UserError(
            f"{pattern} has too few steps from dense for {cycles} cycles; choose fewer, or a share of zeros."
        )
    return found


def divided(settings: RetrainSettings, cycles: int) -> list[RetrainSettings]:
    """The training of each cycle: equal parts of the steps (the first ones longer by one where they must), other seeds.

    UserError for a training that cannot be repeated: fewer steps than cycles, or adapters that never merge.
    """
    if settings.steps < cycles:
        raise UserError(f"{settings.steps} steps cannot be divided into {cycles} cycles; train at least one step each.")
    mode = adapter_mode(settings.parts)
    if cycles > 1 and mode and MODES[mode].merge_ is None:
        raise UserError(f"{mode} adapters never merge, so a second cycle would prune without them; train mask_lora.")
    short, longer = divmod(settings.steps, cycles)
    return [replace(settings, steps=short + (c < longer), seed=settings.seed + c) for c in range(cycles)]


def prune_retrain(
    model: Any,
    calibration: Tensor | None,
    windows: Tensor,
    patterns: Sequence[str | Pattern],
    trainings: Sequence[RetrainSettings],
    method: str = "wanda",
    reconstruct: ReconstructSettings | None = None,
    granularity: str | int = "half-block",
    progress: Progress | None = None,
    teacher: Teacher | None = None,
    stages: Sequence[Finished] | None = None,
    **choice: Any,
) -> list[Pruned]:
    """Prune `model` to each of the patterns in turn, and retrain it on `windows` after each; what each pruning gave.

    What is zero scores lowest, so that magnitude and Wanda never revive a weight; SparseGPT, which moves all weights,
    may. Adapters are merged at the end of each cycle. `stages`, one for each cycle, take what is finished, and a second
    call goes on from them. `choice`: the further keywords of `prune_model`.
    """
    found = []
    for cycle, (pattern, settings) in enumerate(zip(patterns, trainings, strict=True)):
        residence, checkpoint = None, None
        if stages:
            residence, checkpoint = Recorded(model, stages[cycle]), stages[cycle].training
        pruned = prune_model(
            model, calibration, method, pattern, reconstruct, granularity, progress, residence, **choice
        )
        found.append(pruned)
        swap_linears(model, pruned.masks)
        retrain(model, windows, settings, progress, teacher, checkpoint)
        merge(model)
        unswap(model)
    return found
