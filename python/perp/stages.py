"""OUT/perp/unfinished/: what an interrupted run has finished, for the next one to go on from.

job.json            the job, and the rows measured so far
model.safetensors   the model, pruned and reconstructed
masks.safetensors   its masks
retrain.pt          the retraining, every few minutes: `perp.resume`
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from perp import checkpoints
from perp import masks as mask_files
from perp.errors import UserError
from perp.report import Row
from perp.settings import RunSettings

UNFINISHED = checkpoints.UNFINISHED
_JOB, _MODEL, _MASKS, _RETRAIN = "job.json", "model.safetensors", "masks.safetensors", "retrain.pt"
# What may differ between a run and the one that goes on from it.
_FREE = ("out", "overwrite", "resume", "packed")


class Stages:
    """The folder of one job, told from others by the job's settings and the identity of its text."""

    def __init__(self, job: RunSettings, data: Mapping[str, Any]) -> None:
        self.path = job.out / UNFINISHED
        told = {name: value for name, value in dataclasses.asdict(job).items() if name not in _FREE}
        self.identity = json.loads(json.dumps({"settings": told, "data": data}, default=str))

    @property
    def retraining(self) -> Path:
        """The file of the retraining."""
        return self.path / _RETRAIN

    def begun(self) -> bool:
        """Whether there is something to go on from; UserError where it is another job's."""
        if not (self.path / _JOB).exists():
            return False
        try:
            told = json.loads((self.path / _JOB).read_text(encoding="utf-8"))["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged; delete it to begin again.") from error
        if told != self.identity:
            raise UserError(f"{self.path} is of another job; delete it, or choose another output directory.")
        return True

    def read(self, model: nn.Module) -> tuple[list[Row], dict[str, Tensor], dict[str, dict[str, float]]]:
        """The rows, the masks and what refining did, with the pruned weights put into `model`.

        UserError for a damaged file.
        """
        try:
            told = json.loads((self.path / _JOB).read_text(encoding="utf-8"))
            rows = [Row(**row) for row in told["rows"]]
            masks = mask_files.read(self.path / _MASKS)
            load_model(model, self.path / _MODEL)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{self.path} is damaged; delete it to begin again.") from error
        return rows, masks, told["refined"]

    def write(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        masks: Mapping[str, Tensor],
        refined: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Write down that pruning and reconstruction are done; job.json, without which nothing counts, comes last."""
        self.remove()
        self.path.mkdir(parents=True)
        save_model(model, str(self.path / _MODEL))
        mask_files.write(masks, self.path / _MASKS)
        told = {"identity": self.identity, "rows": [dataclasses.asdict(row) for row in rows], "refined": refined}
        (self.path / _JOB).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    def remove(self) -> None:
        """The job is done, or begins anew."""
        shutil.rmtree(self.path, ignore_errors=True)
