"""The one optimiser of reconstruct and retrain: AdamW without weight decay, linear warm-up, linear decay to zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perp import adamw8bit, distributed
from perp.errors import UserError

# How the moments are held: fp32, or 8 bits (`perp.adamw8bit`).
OPTIMIZERS = ("adamw", "adamw8bit")

# float16 gradients below 6e-8 vanish; from 2^16 on down, the first steps find the largest scale that does not overflow.
INITIAL_LOSS_SCALE = 2.0**16


def check(optimizer: str) -> None:
    """UserError for an optimiser that is not known, or whose library is missing."""
    if optimizer not in OPTIMIZERS:
        raise UserError(f"{optimizer!r} is not an optimizer; choose one of {', '.join(OPTIMIZERS)}.")
    if optimizer == "adamw8bit":
        adamw8bit.load()


def learning_rate(step: int, steps: int, lr: float, warmup: float = 0.1) -> float:
    """The rate of step 0 <= step < steps: with w = floor(warmup * steps),

    lr * (step + 1) / (w + 1) for step < w, then lr * (steps - step) / (steps - w).

    It peaks at lr in step w and would reach 0 in step `steps`; no step that is taken has rate 0.
    """
    rise = math.floor(warmup * steps)
    if step < rise:
        return lr * (step + 1) / (rise + 1)
    return lr * (steps - step) / (steps - rise)


class AdamW:
    """AdamW (betas 0.9 and 0.999, eps 1e-8, weight decay 0) over a fixed number of steps with `learning_rate`.

    16-bit parameters are trained through fp32 copies: gradients are added up in fp32, moments and update are fp32, and
    the parameter is the rounded copy; `masters` gives that copy where there is one already. For float16 activations
    (`dtype`) the loss is scaled; a step whose gradients overflow is computed again at half the scale, so none is lost.
    `optimizer`: one of `OPTIMIZERS`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        steps: int,
        warmup: float = 0.1,
        dtype: torch.dtype = torch.float32,
        masters: Mapping[nn.Parameter, Tensor] | None = None,
        optimizer: str = "adamw",
    ) -> None:
        self.parameters = list(parameters)
        if not self.parameters:
            raise UserError("there is nothing to train: choose parts that this model has.")
        if not (math.isfinite(lr) and lr > 0):
            raise UserError(f"the learning rate is {lr}; it must be a positive number.")
        if not 0 <= warmup < 1:
            raise UserError(f"the warm-up share is {warmup}; it must be at least 0 and less than 1.")
        if steps < 1:
            raise UserError(f"the number of steps is {steps}; it must be at least 1.")
        check(optimizer)
        self.lr, self.steps, self.warmup = lr, steps, warmup
        self.taken = 0
        self.scale = INITIAL_LOSS_SCALE if dtype == torch.float16 else 1.0
        for parameter in self.parameters:
            parameter.grad = None
        known = masters or {}
        self.masters = [known.get(p, p.detach().float() if p.dtype.itemsize < 4 else p) for p in self.parameters]
        self.adam: Any = (
            torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0)
            if optimizer == "adamw"
            else adamw8bit.AdamW8bit(self.masters, lr)
        )

    def step(self, losses: Sequence[Callable[[], Tensor]]) -> float:
        """Take one step on the sum of the losses, those of all ranks, and return that sum.

        Each callable runs one micro-batch forward and returns its scalar loss; graphs are freed one after the other. A
        callable may be called again (float16 overflow), so it must not consume what it reads. UserError, with the step
        and the rate, when a loss or a gradient is not finite.
        """
        rate = learning_rate(self.taken, self.steps, self.lr, self.warmup)
        while True:
            total = self._add_up(sum(self._backward(loss()) for loss in losses))
            if not math.isfinite(total):
                self._refuse(f"the loss became {total}", rate)
            if all(master.grad is None or bool(master.grad.isfinite().all()) for master in self.masters):
                break
            self.adam.zero_grad()
            if self.scale <= 1:
                self._refuse("a gradient became infinite or NaN", rate)
            self.scale /= 2
        for master in self.masters:
            if master.grad is not None:
                master.grad /= self.scale
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        self.taken += 1
        return total

    def state(self, moments: bool = True) -> dict[str, Any]:
        """All that another AdamW over the same parameters needs to go on from here: tensors, shared, and numbers.

        Without `moments` it can only take over the parameters.
        """
        return {
            "taken": self.taken,
            "scale": self.scale,
            "adam": self.adam.state_dict() if moments else None,
            "masters": [master.detach() for master in self.masters],
        }

    @torch.no_grad()
    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, parameters included."""
        self.taken, self.scale = state["taken"], state["scale"]
        if state["adam"] is not None:
            self.adam.load_state_dict(state["adam"])
        for parameter, master, saved in zip(self.parameters, self.masters, state["masters"], strict=True):
            master.copy_(saved)
            if master is not parameter:
                parameter.copy_(master)

    def _backward(self, loss: Tensor) -> float:
        (loss.float() * self.scale).backward()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None
        return loss.item()

    def _add_up(self, total: float) -> float:
        """The sum of the ranks' totals; their gradients become the sum, too. None is one that no rank has."""
        told = torch.tensor([total, *(master.grad is not None for master in self.masters)], dtype=torch.float64)
        distributed.add_up_([told])
        gradients = []
        for master, found in zip(self.masters, told[1:].tolist(), strict=True):
            if found:
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
                gradients.append(master.grad)
        distributed.add_up_(gradients)
        return told[0].item()

    def _refuse(self, what: str, rate: float) -> None:
        raise UserError(
            f"{what} in step {self.taken + 1} of {self.steps} at learning rate {rate:.3g}; "
            "train with a smaller learning rate, or in float32 if the model is float16."
        )
