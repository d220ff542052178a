"""Memory of this process, in GB (10^9 bytes)."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")


def resident() -> float:
    """Resident set size now."""
    return psutil.Process().memory_info().rss / 1e9


def peak() -> float:
    """Highest resident set size since `reset_peak`, or since the process began where the system cannot reset it."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024) / 1e9


def reset_peak() -> None:
    """Begin a new peak where the system can (Linux)."""
    with contextlib.suppress(OSError):
        # "5" resets the peak resident set size: proc_pid_clear_refs(5).
        Path("/proc/self/clear_refs").write_text("5")
