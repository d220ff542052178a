"""How far a job is: a live display on a terminal, plain lines anywhere else, or nothing."""

from __future__ import annotations

import re
import sys
import time
from typing import IO, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from perp import machine

# Plain lines of one stage come no faster than this, in seconds: a log of a thousand short steps is read by nobody.
INTERVAL = 2.0
# So many characters of a unit's name fit beside its figures in the live display.
_NAME = 20


class Progress(Protocol):
    """What a long job tells: stages of a known number of units, with the figures of each.

    Figures by name: `loss`, or `before` and `after`, or `perplexity`. A stage begun ends the one before it.
    """

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` units begins."""

    def unit(self, name: str, **figures: float) -> None:
        """One more unit is finished; without a name it counts, but is worth no plain line of its own."""

    def done(self) -> None:
        """The stage, and for now the display, is over."""


class Silent:
    """Tells nothing."""

    def stage(self, name: str, total: int) -> None: ...

    def unit(self, name: str, **figures: float) -> None: ...

    def done(self) -> None: ...


class Plain:
    """A line per unit, for logs and pipes: `prune  3/30  layers.2.mlp  loss 0.0132 -> 0.0087  1m48s left  1.4 GB`."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._name = ""

    def stage(self, name: str, total: int) -> None:
        self.done()
        self._name, self._total, self._count = name, total, 0
        self._started = time.monotonic()
        self._written = -INTERVAL
        self._figures = ""

    def unit(self, name: str, **figures: float) -> None:
        self._count += 1
        self._figures = _figures(figures)
        now = time.monotonic()
        if name and self._count < self._total and now - self._written >= INTERVAL:
            self._written = now
            left = (now - self._started) / self._count * (self._total - self._count)
            self._line(f"{self._count}/{self._total}", name, self._figures, f"{duration(left)} left")

    def done(self) -> None:
        if self._name:
            self._line(f"{self._count}/{self._total}", self._figures, duration(time.monotonic() - self._started))
        self._name = ""

    def _line(self, *parts: str) -> None:
        told = "  ".join(part for part in (self._name, *parts, f"{machine.resident():.1f} GB") if part)
        print(told, file=self._stream, flush=True)


class _Times(ProgressColumn):
    def render(self, task: Task) -> Text:
        told = duration(task.finished_time or task.elapsed or 0)
        if task.time_remaining:
            told += f", {duration(task.time_remaining)} left"
        return Text(told, style="cyan")


class Rich:
    """A live display: one bar per stage with its current unit, figures, times and memory."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars: Bars | None = None
        self._task = TaskID(0)

    def stage(self, name: str, total: int) -> None:
        if self._bars is None:
            self._bars = Bars(
                TextColumn("{task.description}", style="bold"),
                BarColumn(bar_width=10),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                _Times(),
                TextColumn("{task.fields[memory]}", style="dim"),
                console=self._console,
            )
            self._bars.start()
        self._task = self._bars.add_task(name, total=total, figures="", memory="")

    def unit(self, name: str, **figures: float) -> None:
        if self._bars is not None:
            told = "  ".join(part for part in (_short(name), _figures(figures)) if part)
            self._bars.update(self._task, advance=1, figures=told, memory=f"{machine.resident():.1f} GB")

    def done(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None


def choose(console: Console | None = None) -> Progress:
    """Live where standard error (or `console`) is a terminal, plain lines elsewhere."""
    console = console or Console(stderr=True)
    return Rich(console) if console.is_terminal else Plain(console.file)


def duration(seconds: float) -> str:
    """Seconds as people write them: 7s, 3m05s, 2h14m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole // 60 % 60:02}m"


def _short(name: str) -> str:
    """A block's number and what follows tell units apart: model.layers.7.self_attn becomes 7.self_attn."""
    if len(name) > _NAME and (found := re.search(r"\d.*", name)):
        name = found[0]
    return name[:_NAME]


def _figures(figures: dict[str, float]) -> str:
    told = []
    if "before" in figures and "after" in figures:
        told.append(f"loss {figures['before']:.3g} -> {figures['after']:.3g}")
    told += [f"{name} {value:.4g}" for name, value in figures.items() if name not in ("before", "after")]
    return "  ".join(told)
