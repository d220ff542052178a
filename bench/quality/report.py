"""Our figures beside the anchors': a table for the terminal and one for the page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.quality.rows import SEED

Rows = Sequence[Mapping[str, Any]]


def judged(rows: Rows) -> list[str]:
    """The texts that perplexity was measured on, the first row's first."""
    return list(dict.fromkeys(text for row in rows for text in row["perplexity"]))


def joined(rows: Rows) -> list[dict[str, Any]]:
    """One row for each method: of several seeds the mean, the largest peak memory and, under "spread", the sample
    standard deviation of each perplexity; a row of one seed as it is, with an empty "spread"."""
    seeds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        seeds.setdefault(row["row"].partition(SEED)[0], []).append(row)
    return [_mean(found) if len(found) > 1 else {**found[0], "spread": {}} for found in seeds.values()]


def _mean(rows: Rows) -> dict[str, Any]:
    # Seed 0, where it is among them, comes first and has the label without a seed, and the anchor.
    first = rows[0]
    local_errors = [row["local_error"] for row in rows if row.get("local_error") is not None]
    perplexities = {text: [row["perplexity"][text] for row in rows] for text in first["perplexity"]}
    return {
        **first,
        "label": f"{first['label']}, {len(rows)} seeds",
        "perplexity": {text: statistics.mean(values) for text, values in perplexities.items()},
        "spread": {text: statistics.stdev(values) for text, values in perplexities.items()},
        "local_error": statistics.mean(local_errors) if len(local_errors) == len(rows) else None,
        "seconds": statistics.mean(row["seconds"] for row in rows),
        "peak_bytes": max(row["peak_bytes"] for row in rows),
    }


def columns(texts: Sequence[str]) -> list[str]:
    perplexity = [title for text in texts for title in (text, "anchor", "change")]
    return ["row", *perplexity, "zeros", "local error", "retrained", "seconds", "anchor", "peak memory"]


def cells(row: Mapping[str, Any], texts: Sequence[str]) -> list[str]:
    """One line of the table, in the order of `columns`, of a row of `joined`."""
    anchor = row["anchor"] or {}
    shown = [row["label"]]
    for text in texts:
        ours, theirs, spread = row["perplexity"].get(text), anchor.get(text), row["spread"].get(text)
        shown += [
            _number(ours) + ("" if spread is None else f" ± {_number(spread)}"),
            _number(theirs),
            _change(ours, theirs),
        ]
    seconds, local_error = anchor.get("seconds"), row.get("local_error")
    shown += [
        f"{100 * row['zeros']:.2f} %",
        "" if local_error is None else _percent(local_error),
        f"{100 * row['retrained']:.2g} %" if row["retrained"] else "",
    ]
    return [
        *shown,
        f"{row['seconds']:.0f}",
        "" if seconds is None else f"{seconds:.0f}",
        f"{row['peak_bytes'] / 1e9:.2f} GB",
    ]


def table(rows: Rows) -> Table:
    found = Table(title="Perplexity, lower is better", title_justify="left", box=SIMPLE_HEAD)
    texts = judged(rows)
    titles = columns(texts)
    for title in titles:
        found.add_column(title, justify="left" if title == "row" else "right", no_wrap=title == "row")
    for row in joined(rows):
        found.add_row(*cells(row, texts))
    return found


def markdown(rows: Rows) -> str:
    """The table with the name by which `--rows` knows each row, whatever its seeds or its rate."""
    texts = judged(rows)
    titles = columns(texts)
    lines = [[*titles, "NAME"], ["---", *("---:" for _ in titles[1:]), "---"]]
    lines += [[*cells(row, texts), f"`{row['row'].partition('@')[0]}`"] for row in joined(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _change(ours: float | None, theirs: float | None) -> str:
    return _percent(ours / theirs - 1) if ours and theirs else ""


def _percent(change: float) -> str:
    # Adding zero turns a rounded -0.0 into 0.0.
    return f"{round(100 * change, 1) + 0.0:+.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 1000 else f"{value:.4g}"
