"""The physical limit of a case: its bytes over the measured bandwidth or its FLOPs over the measured matrix rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cache

import torch

from bench.registry import Work
from perp_kernels import cpu
from perp_kernels.cpu import native

BUFFER_BYTES = 256 << 20
"""Eight times a 32 MiB last-level cache: nothing of one pass is left for the next."""
REPEATS = 8


def milliseconds(work: Work, dtype: torch.dtype) -> float:
    """The least time `work` can take on this machine with the current number of threads."""
    moving = work.bytes / read_bandwidth()
    computing = work.flops / matrix_rate(dtype) if work.flops else 0.0
    return 1e3 * max(moving, computing)


def described(dtypes: Iterable[torch.dtype]) -> str:
    """The measured figures behind the limits, in words."""
    rates = [
        f"{matrix_rate(dtype) / 1e9:.0f} GFLOP/s in {str(dtype).removeprefix('torch.')} products" for dtype in dtypes
    ]
    return ", ".join([f"{read_bandwidth() / 1e9:.1f} GB/s read", *rates])


def read_bandwidth() -> float:
    """Bytes per second that the current threads read from memory; measured once per number of threads."""
    return _read_bandwidth(torch.get_num_threads())


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP per second of a large dense product at `dtype`; measured once per number of threads."""
    return _matrix_rate(dtype, torch.get_num_threads())


@cache
def _read_bandwidth(threads: int) -> float:
    buffer = torch.ones(BUFFER_BYTES // 8, dtype=torch.int64)
    # torch's reductions are bound by memory on some CPUs only, hence the loop that does nothing but read.
    reads: list[Callable[[], object]] = [buffer.sum, buffer.view(torch.float32).sum]
    if cpu.available:
        reads.append(lambda: native.read_words(buffer))
    return BUFFER_BYTES / min(_fastest(read) for read in reads)


@cache
def _matrix_rate(dtype: torch.dtype, threads: int) -> float:
    def rate(size: int) -> float:
        left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
        return 2 * size**3 / _fastest(lambda: left @ right)

    return max(rate(size) for size in (1024, 2048))


def _fastest(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
