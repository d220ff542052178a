"""Where a training is taken up again: what trained, its moments, the step and the random generators, in one file.

The file of a training that has ended has no moments, and gives what was trained.
"""

from __future__ import annotations

import hashlib
import pickle
import time
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perp.errors import UserError
from perp.files import commit, writing
from perp.optim import AdamW

if TYPE_CHECKING:
    from perp.retrain import RetrainSettings

# A step lost costs what a write costs many times over, but a laptop's disk is not to be kept busy.
SECONDS = 120.0

# What reading a file that this module did not write may raise.
_DAMAGED = (
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    pickle.UnpicklingError,
)

# Numbers of each tensor that tell one model from another.
_SAMPLE = 64


class Checkpoint:
    """The file of one training, told from others by its settings, its windows and a sample of the model's weights."""

    def __init__(self, path: str | Path, model: Any, windows: Tensor, settings: RetrainSettings) -> None:
        self.path = Path(path)
        self.device = model.device
        self.identity = _identity(model, windows, settings)
        self.written = time.monotonic()

    def resume(self, optimiser: AdamW) -> list[float]:
        """Bring the optimiser and the random generators to where the file was written, if there is one; the losses."""
        if not self.path.exists():
            return []
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if state["identity"] == self.identity:
                optimiser.resume(state["optimiser"])
                torch.set_rng_state(state["random"])
                if self.device.type == "cuda":
                    torch.cuda.set_rng_state(state["random of the device"], self.device)
                return [float(loss) for loss in state["losses"]]
        except _DAMAGED as error:
            raise UserError(f"{self.path} is damaged; delete it to train from the beginning.") from error
        raise UserError(f"{self.path} is of another training; delete it, or give another file.")

    def write(self, optimiser: AdamW, losses: list[float], ended: bool = False) -> None:
        """Write the file anew if it is time to, or the training has ended: beside it first, so that one is whole."""
        if not ended and time.monotonic() - self.written < SECONDS:
            return
        device = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".unfinished-{self.path.name}")
        state = {
            "identity": self.identity,
            "optimiser": optimiser.state(moments=not ended),
            "losses": losses,
            "random": torch.get_rng_state(),
            "random of the device": device,
        }
        with writing(self.path):
            try:
                torch.save(state, unfinished)
                commit(unfinished, self.path)
            except RuntimeError as error:  # torch's own, for a full disk
                raise OSError(str(error).splitlines()[0]) from error
            finally:
                unfinished.unlink(missing_ok=True)
        self.written = time.monotonic()


def _identity(model: Any, windows: Tensor, settings: RetrainSettings) -> str:
    told = hashlib.sha256(repr((sorted(settings.parts), astuple(settings)[1:])).encode())
    told.update(windows.cpu().contiguous().numpy().tobytes())
    for name, parameter in model.named_parameters():
        told.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        sample = parameter.detach().flatten()[:_SAMPLE].cpu()
        told.update(sample.view(torch.uint8).numpy().tobytes())
    return told.hexdigest()
