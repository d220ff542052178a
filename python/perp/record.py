"""What an unfinished run has left in its output directory, and whether a second one may go on from it.

OUT/perp/run.json   what the run was told, the files it reads, the versions it runs on, and the rows it has measured
OUT/perp/STAGE/     what it has finished: `perp.stages`
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perp.errors import UserError
from perp.files import write_json
from perp.report import Row

RUN = Path("perp", "run.json")
VERSION = 1
# They are no part of what is computed, or only of how fast.
_FREE = ("out", "overwrite", "gpu_memory", "cpu_memory", "stream")


class Record:
    """The run.json of one run: made by the first process, gone on with by those after it."""

    def __init__(
        self,
        out: Path,
        settings: Mapping[str, Any],
        files: Mapping[str, Any],
        versions: Mapping[str, str],
        overwrite: bool = False,
    ) -> None:
        """Where the run that is there is another one: UserError naming what differs, or with `overwrite` it goes."""
        self._out = out
        told = {name: value for name, value in settings.items() if name not in _FREE}
        content = {"format": VERSION, "settings": told, "files": files, "versions": versions, "rows": {}}
        self._content: dict[str, Any] = json.loads(json.dumps(content, default=str))
        self.resumed = unfinished(out)
        if self.resumed:
            try:
                before = _read(out / RUN)
                _compare(before, self._content, out)
                self._content["rows"] = before["rows"]
            except UserError:
                if not overwrite:
                    raise
                self.resumed = False
        if not self.resumed:
            forget(out)
            write_json(self._content, out / RUN)

    def row(self, stage: str) -> Row | None:
        """The row of this stage, if it has been measured."""
        told = self._content["rows"].get(stage)
        return Row(**told) if told else None

    def add(self, row: Row) -> None:
        self._content["rows"][row.stage] = asdict(row)
        write_json(self._content, self._out / RUN)


def unfinished(out: Path) -> bool:
    """Whether a streamed run has begun in `out` and has not ended."""
    return (out / RUN).is_file()


def forget(out: Path) -> None:
    """Take away what an unfinished run has left, beginning with what makes it one."""
    (out / RUN).unlink(missing_ok=True)
    for stage in _stages(out):
        shutil.rmtree(stage, ignore_errors=True)


def stage(out: Path, name: str) -> Path:
    return out / "perp" / f"stage-{name}"


def _stages(out: Path) -> list[Path]:
    return sorted((out / "perp").glob("stage-*"))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != VERSION:
            raise UserError(f"{path} is of another version of perp; pass --overwrite to begin again.")
        _ = [content[part].items() for part in ("settings", "files", "versions", "rows")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged; pass --overwrite to begin again.") from error
    return content


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
