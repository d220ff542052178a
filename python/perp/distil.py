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

from perp.activations import InMemory
from perp.errors import UserError
from perp.loss import Head, PartLoss
from perp.progress import Progress, Silent


class Teacher:
    """The dense model's hidden states before its head, [1, T, H] in its dtype, by window number."""

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

        The states are kept in CPU memory. UserError where the model's head cannot be run apart from its decoder.
        """
        progress = progress or Silent()
        head = separate_head(dense.eval())
        states = InMemory()
        self._keep(sorted(set(range(len(windows)) if numbers is None else numbers)), states, weight, temperature)
        progress.stage("dense model's states", len(self._at))
        for number in self._at:
            states.append(head.states(windows[number][None].to(dense.device)))
            progress.unit(f"window {number}")
        progress.done()

    @classmethod
    def of(
        cls, numbers: Sequence[int], states: Sequence[Tensor], weight: float = 0.5, temperature: float = 1.0
    ) -> Teacher:
        """The teacher whose states of the windows `numbers` are these, in that order, wherever they are kept."""
        made = cls.__new__(cls)
        made._keep(numbers, states, weight, temperature)
        return made

    def _keep(self, numbers: Sequence[int], states: Sequence[Tensor], weight: float, temperature: float) -> None:
        check(weight, temperature)
        if not weight:
            raise UserError("a teacher of weight 0 teaches nothing; give it a weight above 0.")
        self.weight, self.temperature = weight, temperature
        self._at = {number: place for place, number in enumerate(numbers)}
        self._states = states

    def states(self, numbers: Sequence[int]) -> Tensor:
        """Of these windows [n, T, H]; UserError for one that it has not seen, or for none."""
        missing = [number for number in numbers if number not in self._at]
        if missing or not numbers:
            raise UserError(f"the teacher has not seen window {missing[:1]}; make it for all windows trained on.")
        return torch.cat([self._states[self._at[number]] for number in numbers])

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
        states = self.teacher.states(numbers)[:, :-1].flatten(0, 1)
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


def separate_head(dense: Any) -> Head:
    """The head of the dense model; UserError where it cannot be run apart from its decoder."""
    head = Head(dense)
    if not head.apart:
        raise UserError(f"the head of {type(dense).__name__} cannot be run apart; retrain it without --distil.")
    return head


def check(weight: float, temperature: float) -> None:
    """UserError for a weight or a temperature that cannot be."""
    if not 0 <= weight <= 1:
        raise UserError(f"the weight of distillation is {weight}; it must be between 0 (none) and 1.")
    if not 0 < temperature < float("inf"):
        raise UserError(f"the temperature of distillation is {temperature}; it must be a positive number.")
