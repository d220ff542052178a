"""The physical limit of a case: its bytes over the measured bandwidth or its FLOPs over the measured matrix rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import torch

from bench import device
from bench.registry import Work
from bench.timing import stopwatch
from perp_kernels import cpu
from perp_kernels.cpu import native

BUFFER_BYTES = 256 << 20
"""Eight times a 32 MiB last-level cache: nothing of one pass is left for the next."""
GPU_BUFFER_BYTES = 2 << 30
REPEATS, SECONDS = 8, 1.0
"""At most so many calls, and no further one after so long: a CPU that emulates bf16 takes 4 s for a product of 2048."""


def milliseconds(work: Work, dtype: torch.dtype) -> float:
    """The least time `work` can take on this machine with the current number of threads."""
    moving = work.bytes / bandwidth()
    computing = work.flops / matrix_rate(dtype) if work.flops else 0.0
    return 1e3 * max(moving, computing)


def described(dtypes: Iterable[torch.dtype]) -> str:
    """The measured figures behind the limits, in words."""
    rates = [
        f"{matrix_rate(dtype) / 1e9:.0f} GFLOP/s in {str(dtype).removeprefix('torch.')} products" for dtype in dtypes
    ]
    moved = "copied, bytes read and written" if device.on_gpu() else "read"
    return ", ".join([f"{bandwidth() / 1e9:.1f} GB/s {moved}", *rates])


def bandwidth() -> float:
    """Bytes per second that the current threads read from memory, or that the GPU moves in a copy; measured once."""
    return _copy_bandwidth() if device.on_gpu() else _read_bandwidth(torch.get_num_threads())


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP per second of a large dense product at `dtype`; measured once per device and number of threads."""
    return _matrix_rate(dtype, device.current(), torch.get_num_threads())


@cache
def _copy_bandwidth() -> float:
    source = torch.randn(GPU_BUFFER_BYTES // 4, device=device.current())
    target = torch.empty_like(source)
    return 2 * GPU_BUFFER_BYTES / _fastest(lambda: target.copy_(source))


@cache
def _read_bandwidth(threads: int) -> float:
    buffer = torch.ones(BUFFER_BYTES // 8, dtype=torch.int64)
    # torch's reductions are bound by memory on some CPUs only, hence the loop that does nothing but read.
    reads: list[Callable[[], object]] = [buffer.sum, buffer.view(torch.float32).sum]
    if cpu.available:
        reads.append(lambda: native.read_words(buffer))
    return BUFFER_BYTES / min(_fastest(read) for read in reads)


@cache
def _matrix_rate(dtype: torch.dtype, where: torch.device, threads: int) -> float:
    def rate(size: int) -> float:
        left, right = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
        return 2 * size**3 / _fastest(lambda: left @ right)

    return max(rate(size) for size in ((4096, 8192) if where.type == "cuda" else (1024, 2048)))


def _fastest(call: Callable[[], object]) -> float:
    call()
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < SECONDS:
        times.append(stopwatch()(call))
    return min(times)
