"""Where errors become one sentence on standard error and an exit code, at the edge of the command line."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from perp.errors import Echo, UserError

BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


@contextmanager
def command() -> Iterator[None]:
    """Around one command: what a user can put right becomes a sentence; a bug of ours keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        _fail(
            "interrupted; nothing is left half-written, and perp run goes on when it is given again.", _code(interrupt)
        )
    except Echo as error:
        raise typer.Exit(BAD_INPUT) from error
    except UserError as error:
        _fail(str(error))
    except ValueError as error:
        if not _is_input(error):
            raise
        _fail(str(error))
    except OSError as error:
        if error.errno not in _DISK:
            raise
        _fail(f"{error.filename or 'a file'} cannot be written: {error.strerror}.")
    except (MemoryError, RuntimeError) as error:
        # torch's own class, told by its name so that no command has to import torch for it.
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        _fail("out of memory; use fewer or shorter windows (--windows, --seqlen) or a smaller --batch.")


@contextmanager
def process() -> Iterator[None]:
    """Around the whole program: a polite kill unwinds like Ctrl-C, so that staged files are removed."""
    signal.signal(signal.SIGTERM, _terminate)
    warnings.showwarning = _warn
    told = logging.StreamHandler()
    told.setFormatter(logging.Formatter("perp: %(message)s"))
    logging.getLogger("perp").addHandler(told)
    logging.getLogger("perp").setLevel(logging.INFO)
    # Every retry of an unreachable hub is a line of its log; the sentence at the end says it once. By environment,
    # since the library sets its logger's level when it is imported, which is later.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # transformers imports torchao wherever that is, which warns of kernels that the machine cannot load.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        sys.exit(_code(interrupt))


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise _Terminated


def _code(interrupt: KeyboardInterrupt) -> int:
    return TERMINATED if isinstance(interrupt, _Terminated) else INTERRUPTED


def _is_input(error: ValueError) -> bool:
    """Whether it is a PatternError, or the kernel package raised it, whose ValueErrors are sentences about the input:
    others' are bugs here."""
    # Told by its name, as torch's class above: no command has to import the kernels for it.
    if type(error).__name__ == "PatternError":
        return True
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return last.f_globals.get("__name__", "").partition(".")[0] == "perp_kernels"


def _fail(sentence: str, code: int = BAD_INPUT) -> NoReturn:
    # Not through a console: nothing in the sentence is markup, and a pipe gets it on one line.
    print(f"perp: {sentence}" if sentence.endswith(".") else f"perp: {sentence}.", file=sys.stderr)
    raise typer.Exit(code)


def _warn(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"perp: warning: {message}", file=sys.stderr)
