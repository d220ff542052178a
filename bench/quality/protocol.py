"""The model, the texts and the sizes that all rows of a comparison share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import perp

if TYPE_CHECKING:
    from torch import Tensor

IN_DOMAIN, OUT_OF_DOMAIN = "wiki", "sotu"


@dataclass(frozen=True)
class Protocol:
    """The defaults are the protocol behind the anchors; a JSON file with some of these fields makes another.

    text: documents whose train part calibrates and trains and whose test part is judged ("wiki", in domain); other: a
    text that is only judged, from its start ("sotu", out of domain). Rows tuned on the validation part see neither.
    windows: how many calibrate; steps x batch windows retrain. Seeds draw windows (the first 0, the second 1).
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
        """Windows that perplexity is reported on, or, to tune with, windows of the validation part alone."""
        text = perp.split(perp.documents(self.text))
        if validate:
            return {"validation": perp.windows(tokenizer, text.validation, self.seqlen, self.text_windows)}
        other = perp.documents(self.other).texts
        return {
            IN_DOMAIN: perp.windows(tokenizer, text.test, self.seqlen, self.text_windows),
            OUT_OF_DOMAIN: perp.windows(tokenizer, other, self.seqlen, self.other_windows),
        }
