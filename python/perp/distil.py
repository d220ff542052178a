"""Distillation: part of the retraining loss asks for the dense model's predictions instead of the text's tokens.

With weight w and temperature t, a position's loss is (1 - w) CE + w t² KL(p ‖ q), p and q the softmax of the dense
model's and of the pruned model's logits over t (Hinton, Vinyals and Dean, arXiv 1503.02531). The dense model itself is
not kept: what it computes before its head is, in the store of activations, and its head makes logits of that again,
a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perp.activations import to_memory
from perp.errors import UserError
from perp.loss import Head, PartLoss
from perp.progress import Progress, Silent


class Teacher:
    """The dense model's hidden states before its head, [1, T, H] in its dtype, in CPU memory, by window number."""

    @torch.no_grad()
    def __init__(
        self,
        dense: Any,
        windows: Tensor,
        numbers: Iterable[int] | None = None,
        weight: float = 0.5,
        temperature: float = 1.0,
        progress: Progress | None = None,
    ) -> None:
        """Run `dense` on `windows`, token ids int64 [n, T]: on those given by `numbers`, or on all.

        UserError where the model's head cannot be run apart from its decoder.
        """
        check(weight, temperature)
        if not weight:
            raise UserError("a teacher of weight 0 teaches nothing; give it a weight above 0.")
        progress = progress or Silent()
        head = Head(dense.eval())
        if not head.apart:
            raise UserError(f"the head of {type(dense).__name__} cannot be run apart; retrain it without --distil.")
        self.weight, self.temperature = weight, temperature
        self.states: dict[int, Tensor] = {}
        chosen = sorted(set(range(len(windows)) if numbers is None else numbers))
        progress.stage("dense model's states", len(chosen))
        for number in chosen:
            self.states[number] = to_memory(head.states(windows[number][None].to(dense.device)))
            progress.unit(f"window {number}")
        progress.done()

    def lesson(self, head: Head, trained: Sequence[nn.Parameter]) -> Lesson:
        """What `perp.loss.WindowLoss` needs to teach a model with that head, of which `trained` will move."""
        return Lesson(self, head, trained)


class Lesson:
    """A teacher for one model. The model's head makes the teacher's logits, as it was before any of it moved."""

    def __init__(self, teacher: Teacher, head: Head, trained: Sequence[nn.Parameter]) -> None:
        self.teacher, self.head = teacher, head
        self.trained = list(trained)
        self.dense = [parameter.detach().clone() for parameter in trained]

    def mixed(self, loss: PartLoss, numbers: Sequence[int]) -> PartLoss:
        """`loss` mixed with the divergence from the teacher on the windows `numbers`."""
        missing = [number for number in numbers if number not in self.teacher.states]
        if missing or not numbers:
            raise UserError(f"the teacher has not seen window {missing[:1]}; make it for all windows trained on.")
        states = torch.cat([self.teacher.states[number] for number in numbers])[:, :-1].flatten(0, 1)
        w, t = self.teacher.weight, self.teacher.temperature

        def both(logits: Tensor, start: int, stop: int) -> Tensor:
            with torch.no_grad(), self._dense_head():
                wanted = self.head.logits(states[start:stop].to(logits.device, self.head.model.dtype)).float()
                wanted = F.log_softmax(wanted / t, dim=-1)
            divergence = F.kl_div(F.log_softmax(logits / t, dim=-1), wanted, log_target=True, reduction="sum")
            return (1 - w) * loss(logits, start, stop) + w * t**2 * divergence

        return both

    @contextmanager
    def _dense_head(self) -> Iterator[None]:
        """The head's parameters as they were; through `.data`, so that autograd sees no write."""
        moved = [parameter.data for parameter in self.trained]
        try:
            for parameter, dense in zip(self.trained, self.dense, strict=True):
                parameter.data = dense
            yield
        finally:
            for parameter, own in zip(self.trained, moved, strict=True):
                parameter.data = own


def check(weight: float, temperature: float) -> None:
    """UserError for a weight or a temperature that cannot be."""
    if not 0 <= weight <= 1:
        raise UserError(f"the weight of distillation is {weight}; it must be between 0 (none) and 1.")
    if not 0 < temperature < float("inf"):
        raise UserError(f"the temperature of distillation is {temperature}; it must be a positive number.")
