"""What reconstruction reads and what it fits to, as both go through the model.

| inputs | targets | a unit reads | and is fitted to |
|---|---|---|---|
| sparse | dense-weights | what the pruned model gives it | what its own dense weights make of that (PERP) |
| sparse | dense-model | what the pruned model gives it | what the dense model gives there |
| dense | either | what the dense model gives it | what the dense model gives there (Free Lunch's default) |

Under dense inputs the statistics of the pruning method are the dense model's, too. Beside the targets of the unit in
hand there is one store of activations; with sparse inputs and the dense model's targets, one more.
"""

from __future__ import annotations

from collections.abc import Callable, MutableSequence
from typing import Any

from torch import Tensor

from perp.activations import InMemory, fill
from perp.blocks import outputs
from perp.errors import UserError

INPUTS = ("sparse", "dense")
TARGETS = ("dense-weights", "dense-model")


def check(inputs: str, targets: str) -> None:
    """UserError for what is not in the table."""
    for name, given, known in (("inputs", inputs, INPUTS), ("targets", targets, TARGETS)):
        if given not in known:
            raise UserError(f"{name} cannot be {given!r}; choose {' or '.join(known)}.")


class Flow:
    """`hidden`: what the next unit reads, [1, T, H] per window. `dense`: the dense model's there, if it is another."""

    def __init__(
        self,
        hidden: MutableSequence[Tensor],
        inputs: str = "sparse",
        targets: str = "dense-weights",
        states: Callable[[], MutableSequence[Tensor]] = InMemory,
    ) -> None:
        """`states` makes an empty sequence for the hidden states of all windows."""
        self.hidden = hidden
        self.dense_inputs = inputs == "dense"
        self.dense = fill(states(), hidden) if targets == "dense-model" and not self.dense_inputs else None

    @property
    def taught(self) -> MutableSequence[Tensor]:
        """What targets are computed from, by dense weights."""
        return self.hidden if self.dense is None else self.dense

    @property
    def keeps_targets(self) -> bool:
        """Whether the next unit needs the targets of this one, rather than its outputs in their place."""
        return self.dense_inputs or self.dense is not None

    def follow(
        self, unit: Callable[..., Tensor], targets: MutableSequence[Tensor], arguments: Callable[..., Any]
    ) -> None:
        """Go on to behind `unit`, which has been fitted to `targets` (or replaced them by what it gives)."""
        if self.dense is None:
            self.hidden[:] = targets
        else:
            self.dense[:] = targets
            run(unit, self.hidden, arguments)


def run(unit: Callable[..., Tensor], hidden: MutableSequence[Tensor], arguments: Callable[..., Any]) -> None:
    """Replace each window's hidden state by what `unit` makes of it."""
    for window, output in enumerate(outputs(unit, hidden, arguments)):
        hidden[window] = output
