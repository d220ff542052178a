"""Retraining over packed weights, nothing offloaded: what each phase of it takes, for `rows` to make more blocks of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.streaming.shared import PATTERN, Clock, NoTokenizer, random_windows
from perp import checkpoints, machine, packed_retrain
from perp.finished import Finished, Masks
from perp.prune import prune_model
from perp.residence import Streamed
from perp.retrain import RetrainSettings
from perp.stream import Stream

RANK = 16


class Phases(Clock):
    """Keeps the peak of each phase in bytes, and the loss of each step."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.peaks: dict[str, int] = {}
        self.losses: list[float] = []
        machine.reset_peak(device)

    def stage(self, name: str, total: int) -> None:
        self.end("packing")
        super().stage(name, total)

    def unit(self, name: str, **figures: float) -> None:
        super().unit(name)
        self.losses.append(figures["loss"])

    def done(self) -> None:
        self.end("training")

    def end(self, phase: str) -> None:
        """The phase is over, and the next one begins."""
        self.peaks[phase] = round(1e9 * machine.peak(self._device))
        machine.reset_peak(self._device)


def retrained(
    directory: str, method: str, count: int, seqlen: int, steps: int, device: str, scratch: Path
) -> dict[str, Any]:
    """Prune the model without calibration, and train MaskLoRA and norms in steps of one of `count` windows.

    `peaks`: bytes by phase, of torch on a GPU, of the process on a CPU; `each`: seconds by step. UserError where the
    training has filled a zero.
    """
    stream = Stream(directory, device=device)
    before, after = Finished(scratch / "pruned"), Finished(scratch / "retrained")
    prune_model(stream.model, None, method, PATTERN, residence=Streamed(stream, before))
    after.begin()
    machine.trim()
    phases = Phases(device)
    packed_retrain.retrain(
        stream=stream,
        before=before,
        stage=after,
        tokenizer=NoTokenizer(),
        windows=random_windows(stream.model, count, seqlen),
        settings=RetrainSettings(parts=("mask_lora", "norms"), steps=steps, batch=1, r=RANK),
        progress=phases,
    )
    phases.end("writing")
    with stream.reading(after.tensors):
        for index in range(len(stream.blocks)):
            with stream.enter(index):
                checkpoints.check_zeros(stream.model, Masks(before.masks(index)))
    return {
        "blocks": len(stream.blocks),
        "peaks": phases.peaks,
        "each": phases.each,
        "losses": phases.losses,
    }
