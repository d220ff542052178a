"""What a job found, as rows: a table, a picture and a JSON file of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from perp.errors import UserError
from perp.progress import duration

ROWS, PICTURE = "report.json", "report.png"
DENSE, DENSE_RETRAINED = "dense", "dense retrained"
PRUNED, RECONSTRUCTED, RETRAINED = "pruned", "reconstructed", "retrained"
UNMERGED = "unmerged"


@dataclass(frozen=True)
class Row:
    """One state of the model and what it cost to get there from the state before.

    `perplexity` by the name of the text; `zeros` the share of exact zeros among the weights to prune; `trained` the
    share of the model's parameters trained in this stage and `parameters` their number; `memory` the peak in GB, on the
    device that did the work.
    """

    stage: str
    perplexity: dict[str, float]
    zeros: float
    trained: float = 0.0
    seconds: float = 0.0
    memory: float = 0.0
    parameters: int = 0

    @property
    def is_dense(self) -> bool:
        return self.stage in (DENSE, DENSE_RETRAINED)


@dataclass(frozen=True)
class Report:
    """The rows of one job, in the order of its stages; `title` says what was done, such as "wanda 2:4"."""

    title: str
    rows: list[Row] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return list(self.rows[0].perplexity) if self.rows else []


def table(reports: Sequence[Report]) -> Table:
    """All rows, a section per report; the dense rows, which reports may share, come once."""
    texts = reports[0].texts
    told = Table(
        title="Perplexity, lower is better",
        title_justify="left",
        caption=_domains(texts),
        caption_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    told.add_column("model", no_wrap=True)
    for name in texts:
        told.add_column(name, justify="right", style="bold cyan")
    for name in ("zeros", "trained", "time", "memory"):
        told.add_column(name, justify="right")
    shown: list[Row] = []
    for report in reports:
        told.add_section()
        for row in report.rows:
            if row.is_dense and row in shown:
                continue
            told.add_row(
                row.stage if row.is_dense else f"{report.title} {row.stage}",
                *(number(row.perplexity[name]) for name in texts),
                f"{row.zeros:.2%}",
                _trained(row),
                duration(row.seconds) if row.seconds else "",
                f"{row.memory:.1f} GB" if row.memory else "",
            )
            shown.append(row)
    return told


def _trained(row: Row) -> str:
    """Such as "3.6% 4.9M"; the count only where it is known."""
    if not row.trained:
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)):
        if row.parameters >= size:
            return f"{100 * row.trained:.2g}% {row.parameters / size:.3g}{unit}"
    return f"{100 * row.trained:.2g}%"


def _domains(texts: Sequence[str]) -> str:
    told = f"{texts[0]}: held out from the text trained on."
    return f"{told} {', '.join(texts[1:])}: other text." if texts[1:] else told


def pairs(heading: str, values: Mapping[str, float]) -> Table:
    """A column of names under `heading` and one of figures."""
    told = Table(header_style="bold", box=box.SIMPLE_HEAD)
    told.add_column(heading, no_wrap=True)
    told.add_column("", justify="right", style="bold cyan")
    for name, value in values.items():
        told.add_row(name, number(value))
    return told


def number(perplexity: float, places: int = 3) -> str:
    """Decimals where they mean something, fewer for the large: 13.188, 121.0, 4.2e+05."""
    if not math.isfinite(perplexity) or perplexity >= 1e5:
        return f"{perplexity:.1e}"
    return f"{perplexity:.{places}f}" if perplexity < 100 else f"{perplexity:.1f}"


def write(reports: Sequence[Report], directory: Path) -> list[Path]:
    """Leave report.json, a list of {title, rows}, and report.png in `directory`; the paths written.

    Without matplotlib there is no picture.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    rows = json.dumps([dataclasses.asdict(report) for report in reports], indent=2)
    for name, put in (
        (ROWS, lambda path: path.write_text(rows + "\n", encoding="utf-8")),
        (PICTURE, lambda path: picture(reports, path)),
    ):
        if name == PICTURE and importlib.util.find_spec("matplotlib") is None:
            continue
        # Written beside and renamed, so that an interruption leaves the old file or the new one.
        unfinished = directory / f".unfinished-{name}"
        try:
            put(unfinished)
            unfinished.replace(directory / name)
        finally:
            unfinished.unlink(missing_ok=True)
        written.append(directory / name)
    return written


# Okabe and Ito's blue, vermilion and green: told apart by colour-blind readers, and by their marks without colour.
_MARKS = (("#0072B2", "o"), ("#D55E00", "D"), ("#009E73", "s"))
_INK, _FAINT = "#222222", "#d0d0d0"


def picture(reports: Sequence[Report], path: Path) -> None:
    """A PNG: a panel per report, a line per state of the model, its perplexities on a logarithmic axis.

    Dotted lines mark the first row, the dense model. Raises UserError where matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("drawing the report needs matplotlib: pip install 'perp[demo]'")
    from matplotlib.figure import Figure

    lines = max(len(report.rows) for report in reports)
    values = [value for report in reports for row in report.rows for value in row.perplexity.values()]
    finite = [value for value in values if math.isfinite(value)]
    # A Figure of its own, not pyplot: no display is asked for and no global state left behind.
    figure = Figure(figsize=(4.8 * len(reports) + 1.4, 0.5 * lines + 1.5), layout="constrained")
    panels = figure.subplots(1, len(reports), sharex=True, sharey=True, squeeze=False)[0]
    for panel, report in zip(panels, reports, strict=True):
        _panel(panel, report)
        # Room for the numbers left of the lowest and right of the highest mark.
        panel.set_xlim(min(finite) / 1.8, max(finite) * 1.8)
    panels[0].set_ylim(lines - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    labels = [f"{name}, {'out of' if rank else 'in'} domain" for rank, name in enumerate(labels)]
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=10)
    figure.supxlabel("perplexity on held-out text (log scale, lower is better)", fontsize=10, color=_INK)
    figure.savefig(path, dpi=150)


def _panel(panel: Any, report: Report) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panel.set_title(report.title, fontsize=12, fontweight="bold", loc="left", color=_INK)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    panel.set_yticks(range(len(report.rows)), [row.stage for row in report.rows], fontsize=11, color=_INK)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    for line, row in enumerate(report.rows):
        points = [row.perplexity[name] for name in report.texts]
        panel.plot(points, [line] * len(points), color=_FAINT, linewidth=2, zorder=1)
        for name, point, (color, mark) in zip(report.texts, points, itertools.cycle(_MARKS), strict=False):
            if line == 0:
                panel.axvline(point, color=color, linewidth=1, linestyle=":", alpha=0.6, zorder=0)
            panel.scatter(point, line, color=color, marker=mark, s=50, zorder=3, label=name if line == 0 else None)
            side = -1 if point == min(points) and len(points) > 1 else 1
            panel.annotate(
                number(point, places=1),
                (point, line),
                xytext=(8 * side, 0),
                textcoords="offset points",
                ha="right" if side < 0 else "left",
                va="center",
                fontsize=10,
                color=color,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
