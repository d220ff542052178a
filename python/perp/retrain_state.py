"""What retraining has reached, in a file: parameters, moments, steps and the state of the random numbers.

A safetensors file: "parameter.I", "master.I" (16-bit parameters have an fp32 copy), "mean.I" and "square.I" of the I-th
trained parameter, and "random", the state of torch's generator of the CPU; metadata "perp-retrain": a JSON object of
the losses so far and the scale of the loss.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perp.errors import UserError
from perp.files import commit
from perp.optim import AdamW

_FORMAT = "perp-retrain"


@dataclass(frozen=True)
class Checkpoints:
    """Where retraining keeps its state: in the file `path`, renewed every `every` steps and at the end."""

    path: Path
    every: int = 16

    def due(self, taken: int, steps: int) -> bool:
        return taken == steps or taken % self.every == 0

    def save(self, optimiser: AdamW, losses: list[float]) -> None:
        tensors: dict[str, Tensor] = {"random": torch.random.get_rng_state()}
        for number, (parameter, master) in enumerate(zip(optimiser.parameters, optimiser.masters, strict=True)):
            tensors[f"parameter.{number}"] = parameter.detach()
            if master is not parameter:
                tensors[f"master.{number}"] = master.detach()
            if state := optimiser.adam.state.get(master):
                tensors[f"mean.{number}"] = state["exp_avg"]
                tensors[f"square.{number}"] = state["exp_avg_sq"]
        written = self.path.with_name(f".{self.path.name}")
        about = json.dumps({"losses": losses, "scale": optimiser.scale})
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, written, {_FORMAT: about})
        commit(written, self.path)

    @torch.no_grad()
    def restore(self, optimiser: AdamW) -> list[float]:
        """Bring the parameters and the optimiser to what was saved; the losses of the steps taken so far."""
        if not self.path.is_file():
            return []
        try:
            with safe_open(self.path, framework="pt") as file:
                about = json.loads(file.metadata()[_FORMAT])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for number, (parameter, master) in enumerate(zip(optimiser.parameters, optimiser.masters, strict=True)):
                parameter.copy_(tensors[f"parameter.{number}"])
                if master is not parameter:
                    master.copy_(tensors[f"master.{number}"])
                if f"mean.{number}" in tensors:
                    optimiser.adam.state[master] = {
                        "step": torch.tensor(float(len(about["losses"]))),
                        "exp_avg": tensors[f"mean.{number}"].to(master.device, copy=True),
                        "exp_avg_sq": tensors[f"square.{number}"].to(master.device, copy=True),
                    }
            torch.random.set_rng_state(tensors["random"].clone())
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{self.path} is damaged ({error}); delete it to train from the start.") from error
        optimiser.taken, optimiser.scale = len(about["losses"]), about["scale"]
        return list(about["losses"])
