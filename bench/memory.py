"""Extra memory of a computation: its peak, less what it was given and what it returns."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import device
from perp.machine import peak, reset_peak, resident
from perp_kernels.cpu import tiles

NAMESPACE = "perp_kernels"
KEYS = {
    "cpu": torch._C.DispatchKeySet(torch._C.DispatchKey.CPU),
    "cuda": torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA),
}


class StorageTimeline(TorchDispatchMode):
    """Records when torch storages appear and go, inside perp_kernels' ops too.

    A storage that an operator was handed before any operator made it existed already, and is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        """(serial number of a storage, bytes gained or lost), in order."""
        self._serials: dict[int, int] = {}
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in storages((args, kwargs)):
            self._meet(storage, new=False)
        if func.namespace == NAMESPACE:
            # Called by its key, the op does not come back here, while the operators of its implementation do.
            with self:
                result = func.redispatch(KEYS[device.current().type], *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        for storage in storages(result):
            self._meet(storage, new=True)
        return result

    def serials(self, tree: Any) -> set[int]:
        """The recorded storages behind the tensors of `tree`."""
        return {self._serials[storage._cdata] for storage in storages(tree) if storage._cdata in self._serials}

    def most_alive(self, excluded: set[int]) -> int:
        """Most bytes alive at one time, without the `excluded` storages."""
        alive = most = 0
        for serial, change in self.events:
            if serial not in excluded:
                alive += change
                most = max(most, alive)
        return most

    def _meet(self, storage: torch.UntypedStorage, new: bool) -> None:
        address = storage._cdata
        if address in self._serials:
            return
        self._count += 1
        serial = self._serials[address] = self._count
        size = storage.nbytes() if new else 0
        self.events.append((serial, size))

        def leave() -> None:
            del self._serials[address]
            self.events.append((serial, -size))

        weakref.finalize(storage, leave).atexit = False


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """Storages of the tensors in a nest of lists, tuples and dictionaries."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def extra_bytes(call: Callable[[], Any]) -> int:
    """Most bytes of torch storages alive at one time in `call`, beyond those alive before and those it returns."""
    _start_clean()
    with StorageTimeline() as timeline:
        result = call()
        kept = timeline.serials(result)
    return timeline.most_alive(excluded=kept)


def _start_clean() -> None:
    """Leave nothing behind from earlier calls, so that what a call takes again is counted."""
    gc.collect()
    tiles.release_memory()


def native_extra_bytes(call: Callable[[], Any]) -> int:
    """Growth of the process at its peak in `call`, less the bytes it returns; what torch does not allocate counts too.

    Exact to a few pages for large allocations only; on other C libraries than glibc a lower bound.
    """
    call()
    _start_clean()
    # Memory that was freed but not given back would be used again without any growth.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    reset_peak()
    before = resident()
    result = call()
    returned = {storage._cdata: storage.nbytes() for storage in storages(result)}
    return max(0, round((peak() - before) * 1e9) - sum(returned.values()))
