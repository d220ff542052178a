"""The machine a job runs on: its device, the sizes that suit it, and its memory in GB (10^9 bytes)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import resource
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import psutil

from perp.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")

# M_MMAP_THRESHOLD of mallopt(3). Setting it also ends its adjustment.
_MMAP_THRESHOLD = -3

_STATUS = Path("/proc/self/status")


def find_device(name: str | None = None) -> str:
    """`name`, or a GPU if there is one, else the CPU; UserError for a device that is not here."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{name!r} is not a device; give cpu, cuda or cuda:N.") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no {name} here, torch finds {torch.cuda.device_count()} GPUs; give another device.")
    return name


def multiplies_bf16(device: str) -> bool:
    """Whether `device` has instructions for products in bf16.

    Without them torch is slow: a Zen 3 multiplies 2048 x 576 by 576 x 1536 at a tenth of its speed in fp32.
    """
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Public since February 2026: what has it not runs in fp32, which is slower at worst.
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def processes() -> int:
    """How many processes torchrun has started of this program, on all machines; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def use_threads(count: int | None) -> None:
    """Compute with so many threads; None leaves it to torch."""
    import torch

    if count is not None and count < 1:
        raise UserError(f"threads is {count}; it must be at least 1.")
    if count is not None:
        torch.set_num_threads(count)


def usual_sizes(device: str) -> tuple[int, int]:
    """Calibration windows and their length where none are asked for: 128 x 2048 on a GPU, 32 x 512 on a CPU."""
    return (32, 512) if device == "cpu" else (128, 2048)


def check_dtype(name: str | None) -> None:
    """Refuse a dtype that models are not computed in; None is the checkpoint's own."""
    if name not in (None, *DTYPES):
        raise UserError(f"{name!r} is not a dtype to compute in; choose one of {', '.join(DTYPES)}.")


def parse_size(text: str | None) -> int | None:
    """Bytes of such as "20GB" or "16 GiB"; a number alone is GB."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise UserError(f"{text!r} is not a size of memory; write it as 20GB or 16GiB.")
    power = " kmgt".index(found[2].lower() or ("g" if text.strip()[-1:].lower() != "b" else " "))
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def told(size: int) -> str:
    """Bytes as people write them; nothing for none."""
    return f"{size / 1e9:.3g} GB" if size else ""


def free_memory() -> int:
    """Bytes that this process may still take without driving others out: free ones, and those of caches."""
    limit = _limit()
    free = psutil.virtual_memory().available
    return free if limit is None else min(free, limit)


def _limit() -> int | None:
    """Bytes left to the control group of this process, None where it has no limit."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        group = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        place = Path("/sys/fs/cgroup", group[3:].lstrip("/"))
        used = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        return int((place / "memory.max").read_text()) - int(used["anon"])
    return None


def give_back_memory() -> None:
    """Have large blocks of memory go back to the system as soon as they are freed, where the C library is glibc.

    It takes blocks from the heap once some of their size have been freed, up to 32 MB, and a heap with holes does not
    shrink: fitting one unit of a 1.1B model left 760 MB where 520 MB were the most in use.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)
    trim()


def trim() -> None:
    """Give what is free in the heap back to the system, where the C library can; garbage too."""
    gc.collect()
    release()


def release() -> None:
    """Give what is free in the heap back to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class AnonymousPeak:
    """The highest RssAnon of this process while the block runs, in bytes; looked at 50 times a second."""

    def __init__(self, interval: float = 0.02) -> None:
        self._interval = interval
        self._ended = threading.Event()
        self.most = 0

    def __enter__(self) -> AnonymousPeak:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            self.most = max(self.most, resident_parts()[0])
            self._ended.wait(self._interval)


def resident() -> float:
    """Resident set size of this process now."""
    return psutil.Process().memory_info().rss / 1e9


def resident_parts() -> tuple[int, int]:
    """Bytes of this process in memory now: its own, and mapped files (all as its own where the system tells no more).

    Pages of a mapped file are shared with its other readers and given back when memory is short.
    """
    found = {}
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssFile"):
                found[name] = int(value.split()[0]) * 1024
    if len(found) < 2:
        return psutil.Process().memory_info().rss, 0
    return found["RssAnon"], found["RssFile"]


def reset_peak(device: str = "cpu") -> None:
    """Begin a new peak; for the CPU only where the system can (Linux)."""
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        # "5" resets the peak resident set size: proc_pid_clear_refs(5).
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str = "cpu") -> float:
    """Highest memory since `reset_peak`: allocated by torch on a GPU, the resident set on a CPU.

    On systems that cannot reset it, the CPU's is that since the process began.
    """
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, kilobytes elsewhere: getrusage(2).
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9
