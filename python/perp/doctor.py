"""What this machine and this installation can do: versions, processor, GPU, and which kernel serves each op and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import psutil
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

import perp
import perp_kernels
from perp import demo, machine
from perp_kernels import cpu, cuda

_LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "triton", "cupy")
# Distribution, what it is for, how to get it; they are not needed to prune.
_EXTRAS = (
    ("matplotlib", "the picture of a report", "pip install 'perp[demo]'"),
    ("pyarrow", "text from .parquet files", "pip install 'perp[data]'"),
    ("datasets", "text from data set names", "pip install 'perp[data]'"),
    ("lm_eval", "perp eval --tasks", "pip install 'perp[tasks]'"),
    ("torchao", "--optimizer adamw8bit", "pip install 'perp[adamw8bit]'"),
)


_TELLS_BF16 = {True: "yes", False: "emulated and slow: models in bf16 train and run sooner with --dtype float32"}


def examine() -> Group:
    """Everything, as tables for a console."""
    return Group(
        _pairs("Versions", _versions()),
        _pairs("Machine", _machine()),
        _kernels(),
        _pairs("Optional", _optional()),
    )


def _pairs(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2), title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _versions() -> dict[str, str]:
    own = {"perp": perp.__version__, "perp_kernels": perp_kernels.__version__}
    python = {"python": f"{platform.python_version()} on {platform.platform()}"}
    return own | python | {name: _version(name) or "not installed" for name in _LIBRARIES}


def _version(name: str) -> str | None:
    if name != "cupy":
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None
    # CuPy's distributions are named after the CUDA release they are built for.
    return next((d.version for d in importlib.metadata.distributions() if d.name.startswith("cupy-cuda")), None)


def _machine() -> dict[str, str]:
    features = ", ".join(cpu.cpu_features()) if cpu.available else f"unknown ({cpu.why})"
    memory = psutil.virtual_memory()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count()
    found = {
        "processor": _processor(),
        "cores": f"{usable} usable of {psutil.cpu_count()}, {torch.get_num_threads()} threads in torch",
        "features": features or "none of those the kernels use",
        "bf16 products": _TELLS_BF16[machine.multiplies_bf16("cpu")],
        "CPU kernels": f"{cpu.active_path()} path" if cpu.available else f"plain torch ({cpu.why})",
        "CUDA kernels": cuda.active(),
        "memory": f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB available",
    }
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return found | {"GPU": f"none: this torch is {built}" + (", and finds no device" if torch.version.cuda else "")}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"GPU {index}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 1e9:.1f} GB, CUDA {torch.version.cuda}"
        )
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _kernels() -> Table:
    table = Table(title="Kernels", title_justify="left", title_style="bold", box=None, padding=(0, 2))
    table.add_column("op", style="cyan", no_wrap=True)
    table.add_column("served by", no_wrap=True)
    table.add_column("why", overflow="fold")
    for op, (backend, why) in perp_kernels.active().items():
        if backend == "cpu":
            why = "; ".join(part for part in (cpu.why, why) if part)
        table.add_row(op, backend, Text(why or "the only implementation"))
    return table


def _optional() -> dict[str, str]:
    missing = demo.missing()
    ready = "installed" if not missing else f"without {', '.join(missing)}: {demo.INSTALL}"
    converted = "converted" if demo.is_converted() else "converted on first use"
    rows = {"demo packages": ready, "demo model": f"{converted}, in {demo.cache_dir()}"}
    for name, purpose, install in _EXTRAS:
        version = _version(name) if importlib.util.find_spec(name) else None
        rows[name] = version or f"not installed, needed for {purpose}: {install}"
    return rows
