"""One run at a time in an output directory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from perp.errors import UserError

LOCK = Path("perp", "lock")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the lock of the directory `out`; it goes with the process, however that ends.

    UserError where another process holds it, and where `out` cannot be written.
    """
    path = out / LOCK
    created = [place for place in (out / "perp", out, *out.absolute().parents) if not place.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another output directory.") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        for place in created:  # those that hold something stay
            with suppress(OSError):
                place.rmdir()


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(
                f"another run (process {holder or 'unknown'}) is writing to {path.parent.parent}; wait for it to end "
                "or choose another output directory."
            ) from error
        # The holder before may have removed the file between our opening and our locking it.
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        os.close(descriptor)
