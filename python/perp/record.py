"""What an unfinished run has left in its output directory, and whether a second one may go on from it.

OUT/perp/run.json       what the run was told, the files it reads, the versions it runs on, and the rows it has measured
OUT/perp/stage-NAME/    what each of its stages has finished: `perp.finished`
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import perp
from perp import shards
from perp.errors import UserError
from perp.files import write_json
from perp.report import Row

logger = logging.getLogger("perp")

RUN = Path("perp", "run.json")
VERSION = 2
# They are no part of what is computed, or only of how fast; whether it is streamed is told apart from how it was asked.
_FREE = ("out", "overwrite", "gpu_memory", "cpu_memory", "stream")
_PARTS = ("settings", "files", "versions", "rows")


class Record:
    """The run.json of one run: made by the first process, gone on with by those after it."""

    def __init__(
        self, out: Path, settings: Mapping[str, Any], streamed: bool, model: Path, overwrite: bool = False
    ) -> None:
        """Goes on with the run that is there, or with `overwrite` begins anew; UserError naming what differs.

        `settings`: all that was asked for, with the identity of the text; `model`: the directory it is read from.
        """
        self._out = out
        told = {name: value for name, value in settings.items() if name not in _FREE}
        content = {
            "format": VERSION,
            "settings": {**told, "streamed": streamed},
            "files": {
                **shards.Shards(model).identity(),
                "config.json": shards.checksum(model / "config.json"),
            },
            "versions": {
                "perp": perp.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "rows": {},
        }
        self._content: dict[str, Any] = json.loads(json.dumps(content, default=str))
        self._rows: dict[str, Row] = {}
        if unfinished(out) and not overwrite:
            before = _read(out / RUN)
            _compare(before, self._content, out)
            self._content["rows"], self._rows = before["rows"], _rows(before)
            logger.info(f"going on with the unfinished run in {out}.")
        else:
            forget(out)
            (out / RUN).parent.mkdir(parents=True, exist_ok=True)
            write_json(self._content, out / RUN)

    def row(self, stage: str) -> Row | None:
        """The row of this stage, if it has been measured."""
        return self._rows.get(stage)

    def add(self, row: Row) -> None:
        self._rows[row.stage] = row
        self._content["rows"][row.stage] = asdict(row)
        write_json(self._content, self._out / RUN)


def unfinished(out: Path) -> bool:
    """Whether a run has begun in `out` and has not ended."""
    return (out / RUN).is_file()


def was_streamed(out: Path) -> bool | None:
    """Whether the unfinished run in `out` is a streamed one; None where there is none."""
    return bool(_read(out / RUN)["settings"].get("streamed")) if unfinished(out) else None


def forget(out: Path) -> None:
    """Take away what an unfinished run has left, beginning with what makes it one."""
    (out / RUN).unlink(missing_ok=True)
    for left in (out / "perp").glob("stage-*"):
        shutil.rmtree(left, ignore_errors=True)


def tidy(out: Path) -> None:
    """Take away the record of a run that has not finished anything: another may begin in its place."""
    if not any(path.is_file() for path in (out / "perp").glob("stage-*/*")):
        forget(out)


def stage(out: Path, name: str) -> Path:
    return out / "perp" / f"stage-{name.replace(' ', '-')}"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != VERSION:
            raise UserError(f"{path} is of another version of perp; pass --overwrite to begin again.")
        _ = [content[part].items() for part in _PARTS], _rows(content)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged; pass --overwrite to begin again.") from error
    return content


def _rows(content: Mapping[str, Any]) -> dict[str, Row]:
    rows = {stage: Row(**told) for stage, told in content["rows"].items()}
    for stage, row in rows.items():
        numbers = (*row.perplexity.values(), row.zeros, row.trained, row.seconds, row.memory, row.parameters)
        if row.stage != stage or not all(type(number) in (int, float) for number in numbers):
            raise ValueError(f"{stage} is no row")
    return rows


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    again = "give the same settings to go on, or pass --overwrite to begin again."
    for name in sorted({*before["settings"], *now["settings"]}):
        old, new = before["settings"].get(name), now["settings"].get(name)
        if old != new:
            raise UserError(f"{out} holds an unfinished run with {name} {old!r}, not {new!r}; {again}")
    for name in sorted({*before["files"], *now["files"]}):
        if before["files"].get(name) != now["files"].get(name):
            raise UserError(
                f"{name} has changed since the unfinished run in {out} read it; bring it back to go on, "
                "or pass --overwrite to begin again."
            )
    for name, release in now["versions"].items():
        if before["versions"].get(name) != release:
            raise UserError(
                f"{out} holds an unfinished run of {name} {before['versions'].get(name)}, this is {release}; {again}"
            )
