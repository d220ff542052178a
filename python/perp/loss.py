"""The language-model loss without whole logits: with a large vocabulary they outweigh the rest of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from perp.distil import Teacher

# Logits held at once: 32 MB in fp32; in training their gradient takes as much again.
LOGITS = 1 << 23
# Tokens of the forward that shows whether the head can be run apart from the rest.
PROBE = 8


class Head:
    """What turns the decoder's hidden states into logits, run apart from the decoder and on few positions at a time.

    The head is not always one matrix product (bias, scaling, soft-capping): so the model itself is asked, its decoder
    answering with states it has already computed. A short probe decides whether that gives the model's own logits;
    where it does not (`apart` is False), only whole logits are to be had.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self.vocabulary = model.config.get_text_config().vocab_size
        self.apart = self._probe()

    def states(self, ids: Tensor) -> Tensor:
        """ids int64 [b, T] -> the decoder's hidden states [b, T, H]."""
        return self.decoder(input_ids=ids, use_cache=False)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, H], as the decoder gives it -> logits [n, vocabulary]."""
        answer = self._answer(hidden[None])
        self.decoder.forward = lambda *arguments, **named: answer
        try:
            return self.whole(torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device))[0]
        finally:
            del self.decoder.forward

    def whole(self, ids: Tensor) -> Tensor:
        """ids int64 [b, T] -> logits [b, T, vocabulary]."""
        return self.model(input_ids=ids, use_cache=False).logits

    def chunk(self) -> int:
        """How many positions' logits are held at once."""
        return max(1, LOGITS // self.vocabulary)

    @torch.no_grad()
    def _probe(self) -> bool:
        ids = torch.arange(PROBE, device=self.model.device)[None] % self.model.get_input_embeddings().num_embeddings
        own = self.whole(ids)[0]
        try:
            output = self.decoder(input_ids=ids, use_cache=False)
            self._answer = type(output) if isinstance(output, dict) else lambda hidden: (hidden,)
            found = self.logits(output[0][0])
        except Exception:  # a head that cannot be run apart says so in its own way, and the whole logits remain
            return False
        bound = 4 * torch.finfo(own.dtype).eps * own.abs().max()
        return found.shape == own.shape and bool((found - own).abs().max() <= bound)


# (logits [n, V] in fp32, positions start..stop of all) -> the summed loss of these positions.
PartLoss = Callable[[Tensor, int, int], Tensor]


class WindowLoss:
    """The summed cross-entropy of windows, times a factor; differentiable by whatever of the model is trained.

    With a `teacher`, the cross-entropy gives way to it in part: see `perp.distil`.
    """

    def __init__(self, model: Any, teacher: Teacher | None = None) -> None:
        self.head = Head(model)
        # By module: an embedding that is tied to the head belongs to both.
        inner = set(self.head.decoder.modules())
        outer = [module for module in model.modules() if module not in inner]
        own = {id(p): p for module in outer for p in module.parameters(recurse=False) if p.requires_grad}
        self.trained = list(own.values())
        self.lesson = teacher and teacher.lesson(self.head, self.trained)

    def __call__(self, ids: Tensor, factor: float, numbers: Sequence[int] = ()) -> Tensor:
        """ids int64 [b, T], the windows `numbers` of the teacher -> fp32 scalar; b (T - 1) targets."""
        targets = ids[:, 1:].flatten()

        def loss(logits: Tensor, start: int, stop: int) -> Tensor:
            return F.cross_entropy(logits, targets[start:stop], reduction="sum")

        if not self.head.apart:
            return loss(self.head.whole(ids)[:, :-1].flatten(0, 1).float(), 0, len(targets)) * factor
        hidden = self.head.states(ids)[:, :-1].flatten(0, 1)
        part_loss = self.lesson.mixed(loss, numbers) if self.lesson else loss
        return _ChunkedLoss.apply(hidden, self.head, part_loss, *self.trained) * factor


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss of hidden states [n, H]: each chunk's gradient is formed beside its loss, logits dropped."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, part_loss: PartLoss, *trained: Tensor) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradients = [torch.empty_like(hidden), *map(torch.zeros_like, trained)]
        rows = head.chunk()
        for start in range(0, len(hidden), rows):
            with torch.enable_grad():
                part = hidden[start : start + rows].detach().requires_grad_()
                loss = part_loss(head.logits(part).float(), start, start + len(part))
                found = torch.autograd.grad(loss, [part, *trained], materialize_grads=True)
            total += loss.detach()
            gradients[0][start : start + rows] = found[0]
            for gradient, more in zip(gradients[1:], found[1:], strict=True):
                gradient += more
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *trained = (grad * gradient for gradient in ctx.saved_tensors)
        return hidden, None, None, *trained
