"""Which machine and which commit a figure belongs to."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import torch

from bench import device as measured

ROOT = Path(__file__).resolve().parent.parent
CPU_INFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The CPU's model as the system names it."""
    named = re.search(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(), re.MULTILINE) if CPU_INFO.exists() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def device() -> str:
    """What a row is measured on: a GPU, or a CPU with its number of threads."""
    if measured.on_gpu():
        return measured.name()
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads != 1 else ''}"


def results_name() -> str:
    """The name of this machine's results file."""
    return f"{slug(measured.name() if measured.on_gpu() else cpu_name())}.json"


def slug(name: str) -> str:
    """A name fit for a file: lower-case words joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9.]+", name.lower()))


def commit() -> str:
    """The checked-out commit, with `-dirty` where tracked files other than results differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changes else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
