"""Rows for people: one table per op, losing rows included."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.results import Row

_WHAT = {
    ("", "ms"): "milliseconds",
    ("", "s"): "seconds",
    ("", "tokens/s"): "tokens per second",
    ("", "bytes"): "extra memory over eight chained layers",
    ("plan", "s"): "seconds planned (ours) and taken",
    ("plan", "bytes"): "memory planned (ours) and taken",
    ("stream", "bytes"): "peak memory, of a GPU what torch allocates, else beyond the imports",
    ("generate", "bytes"): "resident memory above the imports and the tokenizer",
}
"""What a table shows by op and unit; the op "" is any other."""


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each op (and unit) in the order of the rows."""
    ordered = sorted(rows, key=lambda row: (row.op, row.unit))
    return [_table(list(group)) for _, group in groupby(ordered, key=lambda row: (row.op, row.unit))]


def _table(rows: Sequence[Row]) -> Table:
    first = rows[0]
    timed = first.unit == "ms"
    peers = list(dict.fromkeys(peer for row in rows for peer in row.peers))
    what = _WHAT.get((first.op, first.unit), _WHAT["", first.unit])
    table = Table(
        title=f"{first.op}: {what} ({first.device}, commit {first.commit})", title_justify="left", box=SIMPLE_HEAD
    )
    for name in ("shape", "dtype", "kernel"):
        table.add_column(name, no_wrap=True)
    figures = [
        "ours",
        *peers,
        *(["limit"] if timed else []),
        *(_compared(first, peer) for peer in peers),
        *(["of limit"] if timed else []),
    ]
    for name in [*figures, *(["extra memory"] if timed else [])]:
        table.add_column(name, justify="right")
    table.add_column("target")
    for row in rows:
        values = [row.ours, *(row.peers.get(peer) for peer in peers), *([row.limit] if timed else [])]
        cells = [row.shape, row.dtype, row.kernel, *(_figure(value, row.unit) for value in values)]
        cells += [_ratio(row, peer) for peer in peers]
        cells += [_share(row)] if timed else []
        cells += [_figure(row.peak_bytes, "bytes")] if timed else []
        table.add_row(*cells, _target(row))
    return table


def _compared(row: Row, peer: str) -> str:
    return f"ours / {peer}" if row.better == "higher" else f"{peer} / ours"


def _ratio(row: Row, peer: str) -> str:
    if not row.verified:
        return "not verified"
    ratio = row.ratio(peer) if peer in row.peers else None
    return "-" if ratio is None else f"{ratio:.2f}x"


def _share(row: Row) -> str:
    return f"{row.limit / row.ours:.0%}" if row.verified and row.limit is not None and row.ours else "-"


def _target(row: Row) -> str:
    if row.target is None:
        return "-"
    bound = "at least" if row.better == "higher" else "at most"
    return f"{'met' if row.met() else 'MISSED'} ({bound} {_figure(row.target, row.unit)})"


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value / (1 << 20):.1f} MiB" if unit == "bytes" else f"{value:.4g}"
