"""Running planned launches: on the GPU, or by whatever a test puts in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from perp_kernels.cuda.plans import Argument, Gpu, Launch

Runner = Callable[[Launch], None]

_stand_in: tuple[Gpu, Runner] | None = None

ALIGNMENT = 16
"""Bytes of a copy to shared memory: what is copied begins at a multiple of them."""

# Above this a kernel has to ask for its dynamic shared memory.
_UNASKED_SHARED = 48 << 10


@contextmanager
def standing_in(gpu: Gpu, run: Runner) -> Iterator[None]:
    """While the block runs, plans are made for `gpu` and each launch goes to `run`; tensors may be on the CPU."""
    global _stand_in
    before, _stand_in = _stand_in, (gpu, run)
    try:
        yield
    finally:
        _stand_in = before


def aligned_rows(matrix: Tensor) -> Tensor:
    """A matrix of 16-bit elements whose rows begin at multiples of 16 bytes: itself or a copy."""
    rows, columns = matrix.shape
    apart = rows <= 1 or (matrix.stride(0) % 8 == 0 and matrix.stride(0) >= columns)
    aligned = matrix.data_ptr() % ALIGNMENT == 0 and matrix.stride(1) == 1 and apart
    return matrix if aligned else matrix.clone(memory_format=torch.contiguous_format)


@functools.cache
def _device_gpu(device: int) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu(10 * properties.major + properties.minor, properties.multi_processor_count)


def gpu_of(tensor: Tensor) -> Gpu:
    return _device_gpu(tensor.device.index) if _stand_in is None else _stand_in[0]


@functools.cache
def _function(source: str, kernel: str, shared: int, device: int) -> Callable[..., None]:
    from cupy_backends.cuda.api import driver

    from perp_kernels.cuda import load

    function = load.module(source, device).module.get_function(kernel)
    if shared > _UNASKED_SHARED:
        driver.funcSetAttribute(function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
    return function


def _passed(argument: Argument) -> np.number:
    if isinstance(argument, Tensor):
        return np.uint64(argument.data_ptr())
    return np.uint64(0) if argument is None else argument


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Launch in order on torch's current stream of `device`. Nothing waits, allocates or loads once it has run before,
    so a CUDA graph can capture it after a first call."""
    if _stand_in is not None:
        for launch in launches:
            _stand_in[1](launch)
        return
    import cupy

    with torch.cuda.device(device):
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device.index)
        for launch in launches:
            function = _function(launch.source, launch.kernel, launch.shared, device.index)
            arguments = tuple(_passed(argument) for argument in launch.arguments)
            function((*launch.grid, 1), (launch.threads, 1, 1), arguments, shared_mem=launch.shared, stream=stream)
