"""Judging a model: perplexity by the papers' protocol, or tasks."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from perp import data, distributed, machine
from perp.errors import UserError
from perp.loss import Head
from perp.progress import Progress, Silent

PARTS = ("test", "validation", "train", "all")


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    windows: torch.Tensor,
    progress: Progress | None = None,
    reading: Callable[[int], AbstractContextManager[None]] | None = None,
) -> float:
    """exp of the mean loss over the non-overlapping `windows`, int64 [n, T]; each gives T - 1 targets, no BOS is added.

    Log-probabilities are taken in fp32, chunk by chunk, so that the logits of a whole window are never held at once.
    `reading` is entered for each window, by its number, while the model computes on it. The windows are spread over
    the ranks, and the result is to the bit that of one rank. Raises UserError where the model gives NaN or infinite
    logits.
    """
    progress = progress or Silent()
    if windows.shape[0] == 0 or windows.shape[1] < 2:
        raise UserError(f"perplexity needs windows of at least two tokens, not {list(windows.shape)}")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    head, losses = Head(model), dict[int, float]()
    for index, window in enumerate(distributed.part(windows).to(device)):
        number = distributed.number(index)
        with reading(number) if reading else nullcontext():
            losses[number] = sum(loss.item() for loss in _losses(head, window))
        if not math.isfinite(losses[number]):
            break
        progress.unit("", perplexity=_mean_exp(losses, windows))
    losses = distributed.merged(losses)
    for number in sorted(losses):
        if not math.isfinite(losses[number]):
            raise UserError(
                f"the model's output on window {number + 1} of {len(windows)} is NaN or infinite: "
                "its weights are damaged or its dtype is too narrow (try --dtype float32)"
            )
    model.train(training)
    return _mean_exp(losses, windows)


def window_length(model: Any, asked: int | None) -> int:
    """The length of windows: as asked, or what suits the machine; never more positions than the model knows."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if asked is None:
        return int(min(machine.usual_sizes(model.device.type)[1], longest))
    if asked > longest:
        raise UserError(f"this model takes at most {longest} tokens at once; give a --seqlen up to that, not {asked}.")
    return asked


def read_texts(sources: Sequence[str], part: str) -> dict[str, list[str]]:
    """The texts to judge on, by label: that part of each source ("test", "validation", "train" or "all").

    "demo" stands for both packaged texts; the second, of which nothing is ever trained on, is taken whole.
    """
    if part not in PARTS:
        raise UserError(f"part cannot be {part!r}; choose among {', '.join(PARTS)}.")
    found: dict[str, list[str]] = {}
    for name in [every for source in sources for every in (["demo", "demo:sotu"] if source == "demo" else [source])]:
        source = data.documents(name)
        whole = name == "demo:sotu" or part == "all"
        told = "" if whole else f" ({part})"
        label = source.label if source.label + told not in found else source.name
        found[label + told] = source.texts if whole else data.split(source).part(part)
    return found


def on_texts(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    seqlen: int | None = None,
    count: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Perplexity on the first `count` windows (None: all) of each text; texts too short are refused before any."""
    progress = progress or Silent()
    seqlen = window_length(model, seqlen)
    windows = {name: data.windows(tokenizer, text, seqlen, count) for name, text in texts.items()}
    found = {}
    for name, tokens in windows.items():
        progress.stage(f"perplexity {name}", distributed.most(len(tokens)))
        found[name] = perplexity(model, tokens, progress)
    progress.done()
    return found


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks that lm_eval does not have, or all where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("judging on tasks needs lm_eval: pip install 'perp[tasks]'.")
    from lm_eval.tasks import TaskManager

    if unknown := sorted(set(tasks) - set(TaskManager().all_tasks)):
        raise UserError(f"lm_eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists those it has.")


def on_tasks(model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None = None) -> dict[str, float]:
    """What lm_eval measures on its tasks, "task metric" -> value, on the first `limit` examples (None: all)."""
    check_tasks(tasks)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    subject = HFLM(pretrained=model, tokenizer=tokenizer)
    try:
        results = lm_eval.simple_evaluate(subject, tasks=list(tasks), limit=limit)["results"]
    except OSError as error:
        raise UserError(f"the data of {', '.join(tasks)} cannot be loaded ({error}); check the network.") from error
    return {
        f"{task} {metric.removesuffix(',none')}": value
        for task, measured in results.items()
        for metric, value in measured.items()
        if isinstance(value, float) and "stderr" not in metric
    }


def _mean_exp(losses: Mapping[int, float], windows: torch.Tensor) -> float:
    """exp of the mean over the targets of these windows, which are added in their order."""
    mean = sum(losses[number] for number in sorted(losses)) / (len(losses) * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf


def _losses(head: Head, window: torch.Tensor) -> Iterator[torch.Tensor]:
    """Summed losses of the window's targets, a chunk of positions at a time."""
    inputs, targets = window[None, :-1], window[1:]
    if not head.apart:
        yield F.cross_entropy(head.whole(inputs)[0].float(), targets, reduction="sum").double()
        return
    hidden = head.states(inputs)[0]
    for states, following in zip(hidden.split(head.chunk()), targets.split(head.chunk()), strict=True):
        yield F.cross_entropy(head.logits(states).float(), following, reduction="sum").double()
