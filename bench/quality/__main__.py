"""`python -m bench.quality`: prune and recover one model by every method of a protocol, beside the anchors.

Rows already in the results file under the same settings are not measured again, but its page and picture are written
anew. Rates are tuned with --validate, which judges on windows that are never reported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import machine, results
from bench.quality import report
from bench.quality.page import page
from bench.quality.picture import picture
from bench.quality.protocol import VALIDATION, Protocol
from bench.quality.rows import ROWS, SEED, Row, named
from bench.quality.store import Store
from bench.quality.worker import Job
from perp import demo, manifest
from perp.errors import UserError

WIDTH = 220


def in_a_process_of_its_own(job: Job) -> dict[str, Any]:
    """What `bench.quality.worker` measures; CalledProcessError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job.to_json()))
        subprocess.run([sys.executable, "-m", "bench.quality.worker", str(path)], cwd=machine.ROOT, check=True)
        return json.loads((path.parent / "result.json").read_text())


@dataclass(frozen=True)
class Bench:
    """Runs rows under one protocol into one results file; models that others continue are kept in `cache`."""

    protocol: Protocol
    store: Store
    cache: Path
    validate: bool = False
    measure: Callable[[Job], dict[str, Any]] = in_a_process_of_its_own

    def run(self, row: Row, redo: bool = False) -> bool:
        """Measures the row, after the row it starts from where that one's model is not there; False if skipped."""
        settings = row.settings(self.protocol)
        if not redo and self.store.has(row.name, settings):
            return False
        source = row.source
        start = self._state(source.name) if source else None
        if source and start and not self._fresh(source, start):
            self.run(source, redo=True)
        starts = {other.start for other in ROWS.values() if other.start}
        continued = row.name in {ROWS[name].at_seed(row.seed).name for name in starts}
        job = Job(row, self.protocol, self.validate, start, self._state(row.name) if continued else None)
        print(f"{row.name}: {row.label}", file=sys.stderr)
        found = self.measure(job)
        identity = {"row": row.name, "label": row.label, "device": machine.device(), "commit": machine.commit()}
        anchor = row.anchor and asdict(row.anchor)
        self.store.put({**identity, **found, "anchor": None if self.validate else anchor, "settings": settings})
        return True

    def merge(self, path: Path) -> None:
        """Takes the rows of another results file in place of ours; UserError, and none taken, for other settings."""
        found = Store(path).rows()
        if not found:
            raise UserError(f"{path} has no rows to merge.")
        for row in found:
            known = row["row"].partition(SEED)[0] in ROWS
            known = known and row["settings"] == named(row["row"]).settings(self.protocol)
            if not known or (VALIDATION in row["perplexity"]) != self.validate:
                raise UserError(f"{path}: {row['row']} was measured under other settings; measure it again.")
        for row in found:
            self.store.put(row)

    def _state(self, name: str) -> Path:
        return self.cache / self.protocol.name / machine.slug(name)

    def _fresh(self, row: Row, state: Path) -> bool:
        try:
            return manifest.read(state)["settings"] == row.settings(self.protocol)
        except UserError:
            return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a row failed, 2 for a wrong option."""
    options = _parser().parse_args(arguments)
    everything = [] if options.merge else list(ROWS)
    names = options.rows.split(",") if options.rows else everything
    if unknown := [name for name in names if name not in ROWS]:
        print(f"there is no row {unknown[0]!r}: choose among {', '.join(ROWS)}.", file=sys.stderr)
        return 2
    if options.lr and not options.validate:
        print("--lr tunes a row, and rows are tuned on validation windows: add --validate.", file=sys.stderr)
        return 2
    rows = [ROWS[name] for name in names]
    try:
        rows = [row.at_rate(float(lr)) for row in rows for lr in options.lr.split(",")] if options.lr else rows
        rows = [row.at_seed(seed) for row in rows for seed in _seeds(options.seeds)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        for row in rows:
            print(f"{row.name:32} {row.label}")
        return 0

    protocol = Protocol.read(options.protocol) if options.protocol else Protocol()
    suffix = "-validation" if options.validate else ""
    out = options.out or results.FOLDER / f"quality-{protocol.name}{suffix}.json"
    bench = Bench(protocol, Store(out), options.cache or demo.cache_dir() / "bench", options.validate)
    try:
        for path in options.merge.split(",") if options.merge else ():
            bench.merge(Path(path))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    failed = []
    for row in rows:
        try:
            if not bench.run(row, options.redo):
                print(f"{row.name}: already there", file=sys.stderr)
        except subprocess.CalledProcessError:
            failed.append(row.name)
    if found := bench.store.rows():
        console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
        console.print(report.table(found))
        shown = out.with_suffix(".png")
        picture(found, shown)
        out.with_suffix(".md").write_text(page(found, protocol, options.validate, shown), encoding="utf-8")
        print(f"{len(found)} rows are in {out}, their page and picture beside it", file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _seeds(given: str) -> list[int]:
    if not all(seed.isascii() and seed.isdigit() for seed in given.split(",")):
        raise ValueError(f"--seeds {given}: seeds are whole numbers from 0, separated by commas, such as 0,1,2.")
    return [int(seed) for seed in given.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=__doc__,
        epilog="example: python -m bench.quality --rows dense,wanda-2:4",
    )
    parser.add_argument("--rows", help="these rows only, separated by commas (see --list)")
    parser.add_argument("--list", action="store_true", help="list the rows, and run nothing")
    parser.add_argument(
        "--merge",
        metavar="FILE[,FILE...]",
        help="take the rows of these results files of the same protocol; what is measured then is what --rows names",
    )
    parser.add_argument("--redo", action="store_true", help="measure rows again that are already there")
    parser.add_argument("--validate", action="store_true", help="judge on validation windows, into a file of its own")
    parser.add_argument("--lr", help="with --validate: other rates of the last training stage, separated by commas")
    parser.add_argument(
        "--seeds",
        default="0",
        help="run the rows with all their seeds (calibration 0, training 1) raised by each of these: 0,1,2",
    )
    parser.add_argument(
        "--protocol", type=Path, help="JSON file with fields of another protocol (bench/quality/protocol.py)"
    )
    parser.add_argument("--out", type=Path, help="results file (default: bench/results/quality-PROTOCOL.json)")
    parser.add_argument(
        "--cache", type=Path, help="where models that other rows continue are kept (default: perp's cache)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
