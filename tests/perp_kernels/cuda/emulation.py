"""The kernels of csrc/cuda run on the CPU: `emulator/machine.h` says how, and what it refuses."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from perp_kernels.cuda.launch import standing_in
from perp_kernels.cuda.plans import Gpu, Launch

HERE = Path(__file__).resolve().parent / "emulator"
SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "cuda"

H100, A100 = Gpu(90, 132), Gpu(80, 108)


@functools.cache
def library() -> ctypes.CDLL:
    """The emulator, built once for each state of its sources; skips where there is no C++ compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("a C++ compiler is needed to run the CUDA kernels on the CPU")
    state = hashlib.sha256()
    for path in sorted([*HERE.iterdir(), *SOURCES.iterdir()]):
        state.update(path.name.encode() + path.read_bytes())
    built = Path(tempfile.gettempdir()) / f"perp-emulator-{state.hexdigest()[:16]}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory() as folder:
            fresh = Path(folder) / "emulate.so"
            options = [
                "-std=c++20",
                "-O1",
                "-U_FORTIFY_SOURCE",
                "-w",
                "-shared",
                "-fPIC",
                '-DPERP_EMULATOR="instructions.h"',
            ]
            command = [compiler, *options, "-I", HERE, "-I", SOURCES, HERE / "emulate.cpp", "-o", fresh]
            subprocess.run([str(part) for part in command], check=True)
            shutil.move(fresh, built)
    loaded = ctypes.CDLL(str(built))
    loaded.emulate.restype = loaded.mistake.restype = ctypes.c_char_p
    return loaded


def _word(argument: Tensor | np.number | None) -> int:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if argument is None:
        return 0
    return int(argument.view(np.uint32)) if isinstance(argument, np.float32) else int(argument)


def emulate(launch: Launch, seed: int = 0) -> None:
    """Run a launch; AssertionError with what the machine found wrong."""
    words = [_word(argument) for argument in launch.arguments]
    tensors = [argument for argument in launch.arguments if isinstance(argument, Tensor)]
    spans = [edge for t in tensors for edge in (t.data_ptr(), _extent(t) * t.element_size())]
    problem = library().emulate(
        launch.kernel.encode(),
        *launch.grid,
        launch.cluster,
        launch.threads,
        launch.shared,
        (ctypes.c_int64 * len(words))(*words),
        (ctypes.c_int64 * len(spans))(*spans),
        len(tensors),
        seed,
    )
    assert problem is None, problem.decode()


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last, gaps included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@contextmanager
def emulated(gpu: Gpu, seed: int = 0) -> Iterator[list[Launch]]:
    """Launches go to the emulator, on tensors of the CPU, as planned for `gpu`; they are listed."""
    launches: list[Launch] = []

    def run(launch: Launch) -> None:
        launches.append(launch)
        emulate(launch, seed)

    with standing_in(gpu, run):
        yield launches
