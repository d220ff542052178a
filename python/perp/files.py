"""Files that are whole or absent, however a process ends."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from perp.errors import UserError


def flush(path: Path) -> None:
    """Have a file, or a directory's list of names, on the disk: a full one may say so only now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(written: Path, final: Path) -> None:
    """Give a finished file its final name; after this it survives even a loss of power."""
    flush(written)
    written.replace(final)
    flush(final.parent)


def write_json(content: Any, path: Path) -> None:
    """`content` as the file `path`, whole or not at all."""
    written = path.with_name(f".{path.name}")
    written.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    commit(written, path)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Around writing what a run has finished: UserError for what the disk refuses, and what is there stays."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{place} could not be written ({str(error).rstrip('.')}); make room and give the same command to go on."
        ) from error
