"""Ranks for the tests: processes on one machine that run the same task, joined as torchrun would join them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from perp import distributed
from perp.errors import UserError

# One process imports what is needed, and the ranks are forked from it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__, "perp.run", "transformers.models.llama.modeling_llama"])


def launch(directory: Path, size: int, task: Callable[..., Any], *arguments: Any, seconds: float = 300) -> list[Any]:
    """What `task(*arguments)` gave on each of `size` ranks, or the exit code of a rank that ended without."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [directory / f"{task.__name__}-{rank}-of-{size}.pt" for rank in range(size)]
    processes = [
        _CONTEXT.Process(target=_rank, args=(rank, size, port, file, task, arguments))
        for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(seconds)
        return [
            torch.load(file, weights_only=False) if file.exists() else process.exitcode
            for file, process in zip(files, processes, strict=True)
        ]
    finally:
        for process in processes:
            process.kill()


def _rank(rank: int, size: int, port: int, file: Path, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with distributed.joined("cpu"):
        torch.save(task(*arguments), file)


def refusal(task: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[str, str]:
    """The kind of the UserError that the task raises, and its sentence."""
    try:
        task(*arguments, **options)
    except UserError as error:
        return type(error).__name__, str(error)
    raise AssertionError("nothing was refused")
