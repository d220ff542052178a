"""Results on disk: `bench/results/DEVICE.json`, one list of rows, replaced as a whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One measured line.

    kernel: what really ran for `ours`. ours, peers, target and limit are in `unit`; `better` says which way is better,
    "lower" or "higher". limit: the physical bound, None where there is none; it is never a peer.
    peak_bytes: extra memory of `ours`. verified: the op's tests and the case's own check passed in the same run.
    """

    op: str
    kernel: str
    shape: str
    dtype: str
    device: str
    commit: str
    ours: float
    peers: dict[str, float]
    unit: str
    better: str
    target: float | None
    limit: float | None
    peak_bytes: int
    verified: bool

    def ratio(self, peer: str) -> float | None:
        """How many times better than the peer ours is; None where that has no number."""
        better, worse = (self.ours, self.peers[peer]) if self.better == "higher" else (self.peers[peer], self.ours)
        return better / worse if worse else None

    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.target is None:
            return None
        return self.ours >= self.target if self.better == "higher" else self.ours <= self.target


def read(path: Path) -> list[Row]:
    """The rows of a results file, none where it does not exist."""
    if not path.exists():
        return []
    return [Row(**row) for row in json.loads(path.read_text())]


def merge(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """`new`, and the `old` rows of ops and devices that `new` has none of, sorted by device and op."""
    replaced = {(row.device, row.op) for row in new}
    kept = [row for row in old if (row.device, row.op) not in replaced]
    return sorted([*kept, *new], key=lambda row: (row.device, row.op))


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replaces the results file."""
    write_json(path, [asdict(row) for row in rows])


def write_json(path: Path, content: Any) -> None:
    """Writes beside `path` and renames, so that a reader or an interruption never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w") as staging:
            json.dump(content, staging, indent=1)
            staging.write("\n")
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
