"""The device that is measured: the CPU, or the GPU that torch takes first."""

from __future__ import annotations

import torch

_current = torch.device("cpu")


def use(name: str) -> None:
    """Measure on "cpu" or "cuda" from now on."""
    global _current
    _current = torch.device(name)


def current() -> torch.device:
    return _current


def on_gpu() -> bool:
    return _current.type == "cuda"


def name() -> str:
    """The GPU's name; only where one is measured."""
    return torch.cuda.get_device_name(_current)
