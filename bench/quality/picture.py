"""A picture of all rows: a panel for each pattern, points numbered by rank, their names in a key beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.quality.report import Rows, joined, judged

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, ANCHOR, DENSE = "#0072B2", "#D55E00", "#555555"
DENSE_PANEL, OTHERS = "dense", "other patterns"
# A pattern with fewer rows shares a panel: a panel of one point compares nothing.
ROWS_OF_A_PANEL = 3
PANEL_INCHES, LINE_INCHES, KEY_SHARE = 2.6, 0.165, 0.52
# Place, alignment, color and weight of the rank, of ours, of the anchor and of the name.
KEY_COLUMNS = (
    (0.03, "right", "black", "normal"),
    (0.12, "right", OURS, "bold"),
    (0.21, "right", ANCHOR, "normal"),
    (0.24, "left", "black", "normal"),
)


def picture(rows: Rows, path: Path) -> None:
    """In-domain perplexity against seconds, both logarithmic, the seconds the same in all panels. Hollow points are the
    anchors, joined to ours; bars the spread of several seeds; dashed lines the dense model's, trained or not."""
    from matplotlib.figure import Figure

    text = judged(rows)[0]
    panels = _panels(joined(rows), text)
    dense = panels.pop(DENSE_PANEL, [])
    titles = list(panels) or [DENSE_PANEL]
    heights = [max(PANEL_INCHES, LINE_INCHES * (len(panels.get(title, ())) + 4)) for title in titles]
    # A figure of its own, not pyplot's: no display is asked for and nothing global is left behind.
    figure = Figure(figsize=(12, sum(heights) + 0.4), layout="constrained")
    grid = figure.subplots(
        len(titles),
        2,
        squeeze=False,
        sharex="col",
        gridspec_kw={"height_ratios": heights, "width_ratios": [1 - KEY_SHARE, KEY_SHARE]},
    )
    for title, (axes, key) in zip(titles, grid, strict=True):
        _frame(axes, title, text)
        shown = panels.get(title, [])
        for rank, row in enumerate(shown, start=1):
            _point(axes, rank, row, text)
        for row in dense:
            axes.axhline(row["perplexity"][text], color=DENSE, linestyle="--", linewidth=0.8, zorder=1)
        _key(key, shown, dense, text)
    grid[-1][0].set_xlabel("seconds (log scale)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _panels(rows: Rows, text: str) -> dict[str, list[Mapping[str, Any]]]:
    """The rows by panel, best first; the dense model's, which no pattern pruned, in DENSE_PANEL."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["perplexity"][text]):
        found.setdefault(_pattern(row), []).append(row)
    small = [name for name, of in found.items() if name != DENSE_PANEL and len(of) < ROWS_OF_A_PANEL]
    if len(small) > 1:
        others = [row for name in small for row in found.pop(name)]
        found[OTHERS] = sorted(others, key=lambda row: row["perplexity"][text])
    return dict(sorted(found.items(), key=lambda panel: (panel[0] == OTHERS, -len(panel[1]))))


def _pattern(row: Mapping[str, Any]) -> str:
    settings = row["settings"]
    while settings["start"] and not settings["pattern"]:
        settings = settings["start"]
    share = (settings["pattern"] or "").partition("/")[0]
    return f"{100 * float(share):g} %" if share.startswith("0.") else share or DENSE_PANEL


def _frame(axes: Axes, title: str, text: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.tick_params(labelbottom=True)
    # A three as well where a panel may span less than a decade.
    for axis, digits in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, (1, 2, 3, 5))):
        axis.set_major_locator(LogLocator(subs=digits))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.set_ylabel(f"perplexity on {text}")
    axes.margins(0.08)
    axes.grid(True, color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _point(axes: Axes, rank: int, row: Mapping[str, Any], text: str) -> None:
    # A method that takes no time at all still has its place on a logarithmic axis.
    ours = max(row["seconds"], 1), row["perplexity"][text]
    if anchor := row["anchor"]:
        theirs = anchor["seconds"], anchor[text]
        axes.plot(*zip(ours, theirs, strict=True), color="#bbbbbb", linewidth=0.8, zorder=1)
        axes.scatter(*theirs, facecolors="none", edgecolors=ANCHOR, s=36, zorder=2)
    if spread := row["spread"].get(text):
        axes.errorbar(*ours, yerr=spread, color=OURS, capsize=3, linewidth=1, zorder=2)
    axes.scatter(*ours, color=OURS, s=110, zorder=3, linewidths=0.5, edgecolors="white")
    axes.annotate(str(rank), ours, color="white", fontsize=6.5, ha="center", va="center", zorder=4)


def _key(axes: Axes, shown: Rows, dense: Rows, text: str) -> None:
    """By rank, the perplexity and the anchor's beside the name."""
    axes.axis("off")
    lines = list(_lines(shown, dense, text))
    for number, words in enumerate(lines):
        height = 1 - (number + 0.5) / max(len(lines), PANEL_INCHES / LINE_INCHES)
        for word, (place, side, color, weight) in zip(words, KEY_COLUMNS, strict=True):
            axes.text(
                place, height, word, color=color, fontsize=8, fontweight=weight, ha=side, va="center",
                transform=axes.transAxes,
            )  # fmt: skip


def _lines(shown: Rows, dense: Rows, text: str) -> Iterator[tuple[str, str, str, str]]:
    yield "", "ours", "anchor", ""
    for rank, row in enumerate([*shown, *dense], start=1):
        anchor = f"{row['anchor'][text]:#.4g}" if row["anchor"] else ""
        yield str(rank) if rank <= len(shown) else "- -", f"{row['perplexity'][text]:#.4g}", anchor, row["label"]
