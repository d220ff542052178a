"""Launching a kernel: its target, its configuration, and a recorder in place of the GPU.

A launcher is a plain function of tensors that ends in `launch`. On tensors of the meta device, inside `recording`,
the same function runs to the same launches without data or a GPU: the tests compile what it records, and so what is
really used, for any architecture.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TUNING = Path(__file__).resolve().parent.parent / "tuning"


@dataclass(frozen=True)
class Target:
    """A GPU as configurations see it."""

    arch: int  # 10 * major + minor of the compute capability
    processors: int  # streaming multiprocessors


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled: its tile sizes, its warps, and the stages of its loop's pipeline."""

    tiles: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3

    def values(self) -> dict[str, int]:
        """All numbers by name."""
        return {**self.tiles, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def with_values(self, values: Mapping[str, int]) -> Config:
        """This configuration with some numbers replaced, by name."""
        rest = dict(values)
        warps, stages = rest.pop("num_warps", self.num_warps), rest.pop("num_stages", self.num_stages)
        if not rest.keys() <= self.tiles.keys():
            raise ValueError(f"A configuration of {', '.join(self.tiles)} has no {', '.join(rest)}.")
        return replace(self, tiles={**self.tiles, **rest}, num_warps=warps, num_stages=stages)


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, its arguments by name, its compile-time switches and its configuration."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    switches: Mapping[str, Any]
    config: Config


@dataclass(frozen=True)
class Configured:
    """A configuration that a call asked for: of which kernel, for which kind of call, and what it would be untuned."""

    kernel: str
    key: str
    default: Config


_recorder: tuple[Target, list[Launch]] | None = None
_overrides: dict[str, Mapping[str, int]] = {}
_configured: list[Configured] | None = None
_compiled: list[Any] | None = None


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Collects the launches of the block, for `target`, instead of running them. For tensors of the meta device."""
    global _recorder
    before = _recorder
    launches: list[Launch] = []
    _recorder = (target, launches)
    try:
        yield launches
    finally:
        _recorder = before


@contextmanager
def override(**configurations: Mapping[str, int]) -> Iterator[None]:
    """Replaces numbers of configurations by kernel name while the block runs: for the tuner and for tests."""
    before = dict(_overrides)
    _overrides.update(configurations)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


@contextmanager
def observing() -> Iterator[tuple[list[Configured], list[Any]]]:
    """Collects the configurations asked for in the block and the compiled kernels that ran: for the tuner."""
    global _configured, _compiled
    _configured, _compiled = [], []
    try:
        yield _configured, _compiled
    finally:
        _configured = _compiled = None


@functools.cache
def _device_target(device: int) -> Target:
    properties = torch.cuda.get_device_properties(device)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


def target(tensor: Tensor) -> Target:
    """The GPU that `tensor` lies on."""
    if _recorder is not None:
        return _recorder[0]
    # The interpreter runs on the CPU, as a small Ampere.
    return _device_target(tensor.device.index) if tensor.is_cuda else Target(80, 2)


@functools.cache
def _tuned(arch: int) -> Mapping[str, Mapping[str, Mapping[str, int]]]:
    path = TUNING / f"sm_{arch}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def configure(kernel: str, target: Target, key: str, default: Config) -> Config:
    """The configuration of `kernel` for a call of kind `key`: the measured one of this GPU, else the default."""
    if _configured is not None:
        _configured.append(Configured(kernel, key, default))
    config = default.with_values(_tuned(target.arch).get(kernel, {}).get(key, {}))
    return config.with_values(_overrides.get(kernel, {}))


def bucket(tokens: int) -> int:
    """The power of two that stands for a number of tokens in the key of a configuration."""
    return 1 << max(tokens - 1, 0).bit_length()


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], switches: Mapping[str, Any], config: Config
) -> None:
    """Run `kernel` on the device of its tensors and torch's current stream; nothing where the grid is empty."""
    if 0 in grid:
        return
    if _recorder is not None:
        _recorder[1].append(Launch(kernel, grid, dict(arguments), dict(switches), config))
        return
    tensor = next(a for a in arguments.values() if isinstance(a, Tensor))
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        built = kernel[grid](
            **arguments,
            **switches,
            **config.tiles,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    if _compiled is not None:
        _compiled.append(built)


def rows_of(x: Tensor, width: int) -> Tensor:
    """x [..., width] as [rows, width] with neighbours in a row side by side, which is what the kernels read."""
    rows = x.reshape(math.prod(x.shape[:-1]), width)
    return rows if rows.stride(1) == 1 or width == 1 else rows.contiguous()
