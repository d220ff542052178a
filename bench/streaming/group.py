"""A control group that ends a process which takes more memory than it may, where this system lets one be made."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_SCOPE = ["systemd-run", "--scope", "--quiet"]


class Unavailable(Exception):
    """Why there is no such group here."""


@contextmanager
def limited(limit: int) -> Iterator[list[str]]:
    """What to put before a command for it to run within `limit` bytes, swap excluded; Unavailable.

    What counts is memory of the process's own and what it has the system read from files, which the system takes back
    where it is short. Pages of libraries that other processes have read before are theirs.
    """
    if scope := _scope(limit):
        yield scope
        return
    group = _group(limit)
    try:
        # The shell enters the group before it becomes the command.
        yield ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group)]
    finally:
        group.rmdir()


def _scope(limit: int) -> list[str] | None:
    """By systemd, the user's or the system's."""
    if not shutil.which(_SCOPE[0]):
        return None
    for whose in ([], ["--user"]):
        command = [*_SCOPE, *whose, "-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0", "--"]
        try:
            if subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0:
                return command
        except subprocess.TimeoutExpired:
            continue
    return None


def _group(limit: int) -> Path:
    """Beside the group that this process is in, by hand; cgroup v2."""
    own = next((line[3:] for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::")), None)
    if own is None or "memory" not in " ".join(_lines(ROOT / "cgroup.controllers")).split():
        raise Unavailable("systemd does not make scopes here, and cgroup v2 does not govern memory")
    parent = (ROOT / own.lstrip("/")).parent
    group = parent / f"perp-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise Unavailable(f"systemd does not make scopes here, and {parent} cannot be written to") from error
    try:
        (group / "memory.max").write_text(str(limit))
        (group / "memory.swap.max").write_text("0")
        return group
    except OSError as error:
        group.rmdir()
        raise Unavailable(f"systemd does not make scopes here, and {parent} does not hand on memory") from error


def _lines(path: Path) -> Sequence[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
