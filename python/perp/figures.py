"""What pruning and fitting did to each part of a model, in numbers: what is told, and written down with the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from perp.reconstruct import Losses
from perp.refine.watch import Refinement
from perp.units import Unit


@dataclass(frozen=True)
class Figures:
    """`losses`: by name of the unit, of those that were fitted. `refined`: by name of the linear, or LINEAR[EXPERT]."""

    losses: dict[str, Losses] = field(default_factory=dict)
    refined: dict[str, Refinement] = field(default_factory=dict)

    def add(self, other: Figures) -> None:
        self.losses.update(other.losses)
        self.refined.update(other.refined)

    def of(self, units: Iterable[Unit]) -> Figures:
        """Those of these units."""
        units = list(units)
        linears = {name for unit in units for name in unit.linears}
        return Figures(
            {unit.name: self.losses[unit.name] for unit in units if unit.name in self.losses},
            {name: found for name, found in self.refined.items() if name.partition("[")[0] in linears},
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "losses": {name: _finite(asdict(losses)) for name, losses in self.losses.items()},
            "refined": {name: asdict(found) for name, found in self.refined.items()},
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Figures:
        """LookupError, TypeError, ValueError or AttributeError for what `to_json` did not give."""
        return cls(
            {name: _losses(own) for name, own in told["losses"].items()},
            {name: Refinement(**own) for name, own in told["refined"].items()},
        )


def _finite(losses: dict[str, Any]) -> dict[str, Any]:
    return {name: value if value is None or math.isfinite(value) else None for name, value in losses.items()}


def _losses(told: Mapping[str, Any]) -> Losses:
    after = math.nan if told["after"] is None else float(told["after"])
    unmerged = told["unmerged"]
    return Losses(
        float(told["before"]), after, bool(told["restored"]), unmerged if unmerged is None else float(unmerged)
    )
