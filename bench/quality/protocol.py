"""The model, the texts and the sizes that all rows of a comparison share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import perp
from perp.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

IN_DOMAIN, OUT_OF_DOMAIN = "wiki", "sotu"
VALIDATION, OTHER_VALIDATION = "validation", "validation, other"


@dataclass(frozen=True)
class Protocol:
    """The defaults are the protocol behind the anchors; a JSON file with some of these fields makes another.

    text: documents whose train part calibrates and trains and whose test part is judged ("wiki", in domain); other: a
    text that is only judged, from its start ("sotu", out of domain). Rows are tuned on the validation part of the one
    and on what follows the reported windows of the other. windows: how many calibrate; steps x batch windows retrain.
    Seeds draw windows (the first 0, the second 1).
    """

    name: str = "smollm2-135m"
    model: str = "demo"
    text: str = "demo:wiki"
    other: str = "demo:sotu"
    seqlen: int = 512
    windows: int = 32
    steps: int = 64
    batch: int = 4
    text_windows: int = 32
    other_windows: int = 16

    @classmethod
    def read(cls, path: Path) -> Protocol:
        return cls(**json.loads(path.read_text()))

    def training_windows(self, tokenizer: Any) -> Tensor:
        """Windows that calibration and retraining draw from, int64 [n, seqlen]."""
        train = perp.split(perp.documents(self.text)).train
        return perp.training_windows(tokenizer, train, self.seqlen, max(self.windows, self.steps * self.batch))

    def judged_windows(self, tokenizer: Any, validate: bool) -> dict[str, Tensor]:
        """Windows that perplexity is reported on, or, to tune with, as many of the same kind that never are."""
        text, other = perp.split(perp.documents(self.text)), perp.documents(self.other).texts
        if validate:
            return {
                VALIDATION: perp.windows(tokenizer, text.validation, self.seqlen, self.text_windows),
                OTHER_VALIDATION: self._behind(tokenizer, other),
            }
        return {
            IN_DOMAIN: perp.windows(tokenizer, text.test, self.seqlen, self.text_windows),
            OUT_OF_DOMAIN: perp.windows(tokenizer, other, self.seqlen, self.other_windows),
        }

    def _behind(self, tokenizer: Any, other: Sequence[str]) -> Tensor:
        """The windows of the other text that follow those reported."""
        found = perp.windows(tokenizer, other, self.seqlen, 2 * self.other_windows)[self.other_windows :]
        if not len(found):
            raise UserError(
                f"{self.other} has no window behind the {self.other_windows} reported ones to tune on: "
                "give a longer text or fewer other_windows."
            )
        return found
