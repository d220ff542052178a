"""Granularity: how much of a model is fitted at once when it is reconstructed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from perp.errors import UserError

NAMES = ("matrix", "half-block", "block", "model")


@dataclass(frozen=True)
class Granularity:
    """ "matrix" (each linear alone), "half-block", "block", "4-blocks" (any number) or "model" (all blocks at once).

    `blocks`: how many blocks make one unit, None for all; 1 for the granularities within a block.
    """

    name: str
    blocks: int | None = 1

    @classmethod
    def parse(cls, text: str | int | Granularity) -> Granularity:
        """Of a name, or of a number of blocks; UserError for anything else."""
        if isinstance(text, Granularity):
            return text
        found = re.fullmatch(r"(\d+)(-blocks?)?", str(text))
        if found and int(found[1]) > 0:
            count = int(found[1])
            return cls("block") if count == 1 else cls(f"{count}-blocks", count)
        if text not in NAMES:
            raise UserError(
                f"{text!r} is no granularity; choose {', '.join(NAMES)} or a number of blocks, such as 4-blocks."
            )
        return cls(str(text), None if text == "model" else 1)

    def __str__(self) -> str:
        return self.name
