"""Retraining: train the chosen parts of the whole model on the language-model loss."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perp import adapters, distil, distributed, head, optim, parts, precision
from perp.distil import Teacher
from perp.errors import UserError
from perp.loss import WindowLoss
from perp.optim import AdamW
from perp.progress import Progress, Silent
from perp.resume import Checkpoint
from perp.sharded import sharded


@dataclass(frozen=True)
class RetrainSettings:
    """What is trained and how long.

    `parts`: see `perp.parts`. `lr` None: the rate that suits the parts. A step takes `batch` windows, computed
    `micro_batch` at a time, with the same gradient. `checkpointing` recomputes each block's activations in the backward
    pass instead of keeping them, where the model offers it. `seed` draws the order of the windows, the adapters' start
    and, where the model has it, dropout. `distil` and `temperature`: the weight of the dense model's predictions in the
    loss and the temperature of both (`perp.distil`). `optimizer`: "adamw" or, with moments of 8 bits, "adamw8bit"
    (`perp.adamw8bit`). `precision`: "model" or "bf16" (`perp.precision`). `shard`: of the blocks' frozen weights each
    rank holds a part (`perp.sharded`).
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
    distil: float = 0.0
    temperature: float = 1.0
    optimizer: str = "adamw"
    precision: str = "model"
    shard: bool = False

    def __post_init__(self) -> None:
        parts.check(self.parts)
        distil.check(self.distil, self.temperature)
        precision.get(self.precision)
        optim.check(self.optimizer)

    @property
    def rate(self) -> float:
        """`lr`, or the default for these parts."""
        return parts.default_rate(parts.RETRAIN_RATES, self.parts) if self.lr is None else self.lr


def retrain(
    model: Any,
    windows: Tensor,
    settings: RetrainSettings | None = None,
    progress: Progress | None = None,
    teacher: Teacher | None = None,
    checkpoint: str | Path | None = None,
) -> list[float]:
    """Train `model` in place on `windows`, token ids int64 [n, T]; returns the loss of every step before its update.

    The loss is the mean cross-entropy of a batch's T - 1 targets per window, or what `settings.distil` makes of it with
    the `teacher`, made of the dense model and the same windows (those that `drawn` gives will do). Adapters are
    attached where the parts name a mode and none are there, and are left for `perp.adapters.merge`; what trained keeps
    requires_grad. The same settings on the same machine's CPU repeat bitwise. Where there are several ranks
    (`perp.distributed`), all call this alike, each computes on a part of every batch, and all end with the same model.

    With `checkpoint`, a file, the training is written down every few minutes and at its end, and goes on from there
    when it is called again the same way, to the same bits. UserError for windows that are no token ids of this model, a
    checkpoint of another training and, with step and rate, for a loss that is not finite.
    """
    settings, progress = settings or RetrainSettings(), progress or Silent()
    _check(model, windows, settings, teacher)
    if checkpoint and distributed.size() > 1:
        raise UserError("a training spread over several processes writes no checkpoint; leave it out.")
    mode = parts.adapter_mode(settings.parts)
    if mode and not adapters.adapted(model):
        adapters.attach(model, mode, settings.r, settings.alpha, settings.seed)
    if "head" in settings.parts and not head.adapted(model):
        head.attach(model, settings.r, settings.alpha, settings.seed)
    parameters = parts.select_trainable(model, settings.parts)
    losses: list[float] = []
    saved = Checkpoint(checkpoint, model, windows, settings) if checkpoint else None
    with (
        precision.narrowed(model, precision.get(settings.precision)) as masters,
        _training(model, settings.checkpointing, settings.seed),
        sharded(model, settings.shard),
    ):
        optimiser = AdamW(
            parameters, settings.rate, settings.steps, settings.warmup, model.dtype, masters, settings.optimizer
        )
        loss = WindowLoss(model, teacher if settings.distil else None)
        if saved:
            losses = saved.resume(optimiser)
        left = drawn(len(windows), settings)[len(losses) :]
        progress.stage("retrain", len(left))
        started, tokens = time.monotonic(), 0
        for order in left:
            share = 1 / (len(order) * (windows.shape[1] - 1))
            micro = [
                partial(loss, windows[part].to(model.device), factor, part.tolist())
                for part, factor in _own_part(order, share, settings.micro_batch)
            ]
            losses.append(optimiser.step(micro))
            tokens += len(order) * windows.shape[1]
            speed = tokens / (time.monotonic() - started)
            progress.unit(f"step {len(losses)}", **{"loss": losses[-1], "tokens/s": speed})
            if saved:
                saved.write(optimiser, losses, ended=len(losses) == settings.steps)
    progress.done()
    return losses


def drawn(count: int, settings: RetrainSettings) -> list[Tensor]:
    """The window numbers of each step: one seeded permutation after another, cut into batches."""
    generator = torch.Generator().manual_seed(settings.seed)
    needed = settings.steps * settings.batch
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
    return list(torch.cat(rounds)[:needed].split(settings.batch)) if rounds else []


def _own_part(order: Tensor, share: float, size: int) -> list[tuple[Tensor, float]]:
    """This rank's micro-batches of a batch, each with its factor.

    They are as many on every rank, since sharded blocks run on all at once; what is added is a repetition of factor 0.
    """
    own = [(part, share) for part in distributed.part(order).split(size)]
    missing = -(-distributed.most(len(order)) // size) - len(own)
    return own + [(own[-1][0], 0.0)] * missing


@contextmanager
def _training(model: Any, checkpointing: bool, seed: int) -> Iterator[None]:
    """Train mode with seeded dropout and, where the model offers it, checkpointed blocks; all undone at the end."""
    checkpointing = checkpointing and model.supports_gradient_checkpointing
    # transformers renames this from 5.23 on; the older name warns there and is the only one before.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    was_training = model.training
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        # Ranks drop differently, as the windows of one batch do.
        torch.manual_seed(seed + distributed.rank())
        model.train()
        try:
            if checkpointing:
                getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
            yield
        finally:
            if checkpointing:
                getattr(model, f"{name}_checkpointing_disable")()
            model.train(was_training)


def _check(model: Any, windows: Tensor, settings: RetrainSettings, teacher: Teacher | None) -> None:
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
    distributed.check_batch(settings.batch)
    if settings.precision == "bf16" and model.dtype == torch.float16:
        raise UserError("the model is float16, which bf16 does not widen; load it in float32 or bfloat16.")
    if settings.distil and teacher is None:
        raise UserError("distillation needs a teacher: make a perp.Teacher of the dense model, or set distil to 0.")
