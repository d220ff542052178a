"""Retraining: train the chosen parts of the whole model on the language-model loss."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perp.adapters import attach, select_trainable
from perp.errors import UserError
from perp.linear import SparseLinear
from perp.loss import WindowLoss
from perp.optim import AdamW
from perp.progress import Progress, Silent


@dataclass(frozen=True)
class RetrainSettings:
    """What is trained and how long.

    `parts`: see `perp.adapters.select_trainable`. `lr` None: the rate that suits the parts. A step takes `batch`
    windows, computed `micro_batch` at a time, with the same gradient. `checkpointing` recomputes each block's
    activations in the backward pass instead of keeping them, where the model offers it. `seed` draws the order of the
    windows, the adapters' start and, where the model has it, dropout.
    """

    parts: Collection[str] = ("mask_lora", "norms")
    steps: int = 64
    batch: int = 4
    lr: float | None = None
    warmup: float = 0.1
    r: int = 16
    alpha: float = 32
    seed: int = 1
    checkpointing: bool = True
    micro_batch: int = 1

    @property
    def rate(self) -> float:
        """`lr`, or the default for these parts."""
        if self.lr is not None:
            return self.lr
        return 1e-4 if "kept" in self.parts else 2e-3


def retrain(
    model: Any, windows: Tensor, settings: RetrainSettings | None = None, progress: Progress | None = None
) -> list[float]:
    """Train `model` in place on `windows`, token ids int64 [n, T]; returns the loss of every step before its update.

    The loss is the mean cross-entropy of a batch's T - 1 targets per window. Adapters are attached if "mask_lora" is
    trained and none are there, and are left for `perp.adapters.merge`; what trained keeps requires_grad. The same
    settings on the same machine's CPU repeat bitwise. UserError for windows that are no token ids of this model and,
    with step and rate, for a loss that is not finite.
    """
    settings, progress = settings or RetrainSettings(), progress or Silent()
    _check(model, windows, settings)
    if "mask_lora" in settings.parts and not _has_adapters(model):
        attach(model, "mask_lora", settings.r, settings.alpha, settings.seed)
    parameters = select_trainable(model, settings.parts)
    optimiser = AdamW(parameters, settings.rate, settings.steps, settings.warmup, dtype=model.dtype)
    loss = WindowLoss(model)
    losses: list[float] = []
    progress.stage("retrain", settings.steps)
    started = time.monotonic()
    with _training(model, settings.checkpointing, settings.seed):
        for order in _draws(len(windows), settings):
            batch = windows[order].to(model.device)
            share = 1 / (len(batch) * (batch.shape[1] - 1))
            micro = [partial(loss, part, share) for part in batch.split(settings.micro_batch)]
            losses.append(optimiser.step(micro))
            speed = len(losses) * batch.numel() / (time.monotonic() - started)
            progress.unit(f"step {len(losses)}", **{"loss": losses[-1], "tokens/s": speed})
    progress.done()
    return losses


@contextmanager
def _training(model: Any, checkpointing: bool, seed: int) -> Iterator[None]:
    """Train mode with seeded dropout and, where the model offers it, checkpointed blocks; all undone at the end."""
    checkpointing = checkpointing and model.supports_gradient_checkpointing
    # transformers renames this from 5.23 on; the older name warns there and is the only one before.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    was_training = model.training
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.train()
        try:
            if checkpointing:
                getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
            yield
        finally:
            if checkpointing:
                getattr(model, f"{name}_checkpointing_disable")()
            model.train(was_training)


def _draws(count: int, settings: RetrainSettings) -> Iterator[Tensor]:
    """The window numbers of each step: one seeded permutation after another, cut into batches."""
    generator = torch.Generator().manual_seed(settings.seed)
    needed = settings.steps * settings.batch
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
    yield from torch.cat(rounds)[:needed].split(settings.batch)


def _check(model: Any, windows: Tensor, settings: RetrainSettings) -> None:
    if windows.ndim != 2 or windows.dtype != torch.int64 or len(windows) == 0 or windows.shape[1] < 2:
        raise UserError(
            f"the training windows are {windows.dtype} {list(windows.shape)}; they must be int64 [n, T], "
            "at least one window of at least two tokens."
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if windows.min() < 0 or windows.max() >= vocabulary:
        raise UserError(
            f"the training windows hold tokens {int(windows.min())} to {int(windows.max())}, but the model knows 0 to "
            f"{vocabulary - 1}; tokenise the text with the model's own tokenizer."
        )
    if settings.batch < 1 or settings.micro_batch < 1:
        raise UserError("the batch and the micro-batch must be at least one window.")


def _has_adapters(model: Any) -> bool:
    return any(isinstance(module, SparseLinear) and module.mode is not None for module in model.modules())
