"""What both measurements, of fitting and of retraining, are made with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perp.progress import Silent

PATTERN = "2:4"


class NoTokenizer:
    """Random weights have none to save."""

    def save_pretrained(self, directory: Path) -> None: ...


def random_windows(model: Any, count: int, seqlen: int) -> Tensor:
    """Token ids of the model, int64 [count, seqlen]."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(3, vocabulary, (count, seqlen), generator=torch.Generator().manual_seed(0))


class Clock(Silent):
    """The progress of one stage: `each`, the seconds of its units."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.each: list[float] = []

    def stage(self, name: str, total: int) -> None:
        self._begun = self._now()

    def unit(self, name: str, **figures: float) -> None:
        now = self._now()
        self.each.append(now - self._begun)
        self._begun = now

    def _now(self) -> float:
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
