"""The block that comes next, read while the one before it computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perp import shards


class Ahead:
    """Holds at most one block that has not been asked for yet.

    A thread reads the block's part of its files, so that they are in memory when they are looked at through their
    mapping, and brings its weights to the device by way of pinned memory, on a stream of their own. What goes wrong
    there is raised where the block is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._key: Any = None
        self._shell: nn.Module | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, key: Any, make: Callable[[], nn.Module], places: Mapping[str, Path]) -> None:
        """Begin to bring what `make()` gives, mapped from `places` (tensor -> file); one that waits gives way."""
        self.drop()
        self._key, self._shell = key, make()
        self._thread = threading.Thread(target=self._bring, args=(self._shell, places), name="perp-ahead", daemon=True)
        self._thread.start()

    def take(self, key: Any) -> nn.Module | None:
        """The module begun under this key, whole and on its device; None where that was another one."""
        found, thread = self._shell if key == self._key else None, self._thread
        if thread:
            thread.join()
        error = self._error
        self._forget()
        if found is None:
            return None
        if error:
            raise error
        if self._stream:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in (*found.parameters(), *found.buffers()):
                # Allocated for one stream and freed after use on another, which the allocator has to be told.
                tensor.data.record_stream(current)
        return found

    def drop(self) -> None:
        """Wait for the thread, and forget what it brought."""
        if self._thread:
            self._thread.join()
        self._forget()

    def _forget(self) -> None:
        self._key = self._shell = self._thread = self._error = None

    def _bring(self, shell: nn.Module, places: Mapping[str, Path]) -> None:
        try:
            # Before the mapping is looked at: a file that has shrunk is an error here, and a fault that ends the
            # process there.
            shards.read_through(places)
            if self._stream:
                with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                    for tensor in (*shell.parameters(), *shell.buffers()):
                        tensor.data = tensor.data.pin_memory().to(self._device, non_blocking=True)
        except BaseException as error:
            self._error = error
