"""Our figures beside the anchors': a table for the terminal, one for Markdown, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

Rows = Sequence[Mapping[str, Any]]
OURS, ANCHOR = "#0072B2", "#D55E00"


def columns(judged: Sequence[str]) -> list[str]:
    perplexity = [title for text in judged for title in (text, "anchor", "change")]
    return ["row", *perplexity, "zeros", "retrained", "seconds", "anchor", "peak memory"]


def cells(row: Mapping[str, Any], judged: Sequence[str]) -> list[str]:
    """One line of the table, in the order of `columns`."""
    anchor = row["anchor"] or {}
    shown = [row["label"]]
    for text in judged:
        ours, theirs = row["perplexity"].get(text), anchor.get(text)
        shown += [_number(ours), _number(theirs), _change(ours, theirs)]
    seconds = anchor.get("seconds")
    shown += [f"{100 * row['zeros']:.2f} %", f"{100 * row['retrained']:.2g} %" if row["retrained"] else ""]
    return [
        *shown,
        f"{row['seconds']:.0f}",
        "" if seconds is None else f"{seconds:.0f}",
        f"{row['peak_bytes'] / 1e9:.2f} GB",
    ]


def table(rows: Rows) -> Table:
    found = Table(title="Perplexity, lower is better", title_justify="left", box=SIMPLE_HEAD)
    judged = _judged(rows)
    titles = columns(judged)
    for title in titles:
        found.add_column(title, justify="left" if title == "row" else "right", no_wrap=title == "row")
    for row in rows:
        found.add_row(*cells(row, judged))
    return found


def markdown(rows: Rows) -> str:
    judged = _judged(rows)
    titles = columns(judged)
    lines = [titles, ["---", *("---:" for _ in titles[1:])], *(cells(row, judged) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(rows: Rows, path: Path) -> None:
    """In-domain perplexity against seconds, a point per row; hollow points are the anchors, joined to ours."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    text = _judged(rows)[0]
    # A figure of its own, not pyplot's: no display is asked for and nothing global is left behind.
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("seconds")
    axes.set_ylabel(f"perplexity on {text} (log scale, lower is better)")
    axes.grid(True, color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for row in rows:
        ours, anchor = (row["seconds"], row["perplexity"][text]), row["anchor"]
        if anchor:
            theirs = anchor["seconds"], anchor[text]
            axes.plot(*zip(ours, theirs, strict=True), color="#bbbbbb", linewidth=0.8, zorder=1)
            axes.scatter(*theirs, facecolors="none", edgecolors=ANCHOR, s=36, zorder=2)
        axes.scatter(*ours, color=OURS, s=36, zorder=3)
        # Below its point: the anchor to beat, and the line to it, lie above.
        axes.annotate(row["label"], ours, xytext=(5, -11), textcoords="offset points", fontsize=8)
    axes.scatter([], [], color=OURS, s=36, label="ours")
    axes.scatter([], [], facecolors="none", edgecolors=ANCHOR, s=36, label="anchor")
    axes.legend(frameon=False)
    axes.margins(x=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _judged(rows: Rows) -> list[str]:
    return list(dict.fromkeys(text for row in rows for text in row["perplexity"]))


def _change(ours: float | None, theirs: float | None) -> str:
    # Adding zero turns a rounded -0.0 into 0.0.
    return f"{round(100 * (ours / theirs - 1), 1) + 0.0:+.1f} %" if ours and theirs else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 1000 else f"{value:.4g}"
