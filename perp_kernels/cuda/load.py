"""Where a kernel's machine code comes from: a cubin that came with the wheel, else NVRTC, whose results are kept.

A cubin that is missing is nothing to speak of; one that was built from other sources than those beside it, or that the
driver refuses, is passed over with one warning. So is a folder that cannot be written to: kernels are then compiled in
every process. NVRTC needs no headers and no toolkit, for the sources include nothing but each other.

PERP_KERNEL_CACHE names the folder for what NVRTC compiled (default: perp_kernels under XDG_CACHE_HOME or ~/.cache).
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
CUBINS = _HERE / "cubins"

# In a wheel the sources lie beside this file; in a checkout, where they are written.
SOURCES = next((p for p in (_HERE / "source", _HERE.parents[1] / "csrc" / "cuda") if p.is_dir()), _HERE / "source")

HEADERS = (".cuh", ".h")


@functools.cache
def fingerprint() -> str:
    """Of all sources, names and bytes, as CMakeLists.txt writes it into each cubin: what they are known by."""
    lines = ""
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cu", *HEADERS):
            lines += f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
    return hashlib.sha256(lines.encode()).hexdigest()


def architecture(capability: tuple[int, int]) -> str:
    """What to compile for: sm_90a has instructions that sm_90 has not."""
    return "sm_90a" if capability == (9, 0) else "sm_{}{}".format(*capability)


def shipped_for(capability: tuple[int, int]) -> str:
    """The architecture whose cubin this GPU runs: within a generation, code for the first runs on all."""
    return architecture(capability) if capability[0] == 9 else f"sm_{capability[0]}0"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def prebuilt(source: str, capability: tuple[int, int]) -> bytes | None:
    """The shipped cubin of a source, None where there is none of these sources for this GPU."""
    try:
        cubin = (CUBINS / f"{source}.{shipped_for(capability)}.cubin").read_bytes()
    except OSError:
        return None
    if fingerprint().encode() in cubin:
        return cubin
    _warn_once(
        f"The CUDA kernels in {CUBINS} were built from other sources than those of this package, so NVRTC compiles "
        "them anew: reinstall the package, or delete the folder."
    )
    return None


def _cache_folder() -> Path:
    named = os.environ.get("PERP_KERNEL_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perp_kernels"


def compile_source(source: str, arch: str) -> bytes:
    """A cubin by NVRTC. Raises RuntimeError with the compiler's words; needs CuPy, but no GPU."""
    from cupy.cuda import nvrtc

    headers = [path for path in sorted(SOURCES.iterdir()) if path.suffix in HEADERS]
    program = nvrtc.createProgram(
        (SOURCES / f"{source}.cu").read_text(),
        f"{source}.cu",
        [path.read_bytes() for path in headers],
        [path.name.encode() for path in headers],
    )
    try:
        nvrtc.compileProgram(program, ("-std=c++17", f"-arch={arch}"))
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"NVRTC cannot compile {source} for {arch}: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def compiled(source: str, arch: str, build: Callable[[str, str], bytes] = compile_source) -> bytes:
    """The cubin of `build`, kept on disk under the fingerprint of the sources."""
    path = _cache_folder() / f"{source}.{arch}.{fingerprint()[:16]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    cubin = build(source, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        Path(file.name).replace(path)  # another process may write the same at the same time
    except OSError as error:
        _warn_once(
            f"Compiled CUDA kernels cannot be kept in {path.parent} ({error.strerror}): every process compiles them "
            "again; set PERP_KERNEL_CACHE to a folder that can be written."
        )
    return cubin


def _load(cubin: bytes, device: int) -> Any:
    from cupy.cuda.function import Module

    with torch.cuda.device(device):
        loaded = Module()
        loaded.load(cubin)
    return loaded


@dataclass(frozen=True)
class Loaded:
    """A module of CuPy's and where its code came from."""

    module: Any
    origin: str


_origins: dict[tuple[int, str], str] = {}


@functools.cache
def module(source: str, device: int) -> Loaded:
    """The loaded module of a source on a device. Raises RuntimeError where neither a cubin nor NVRTC gives one."""
    capability = torch.cuda.get_device_capability(device)
    cubin = prebuilt(source, capability)
    if cubin is not None:
        try:
            return Loaded(_load(cubin, device), f"cubin for {shipped_for(capability)}")
        except Exception as error:
            _warn_once(
                f"The driver refuses the CUDA kernels that came with this package, so NVRTC compiles them: {error}"
            )
    arch = architecture(capability)
    try:
        return Loaded(_load(compiled(source, arch), device), f"NVRTC for {arch}, kept in {_cache_folder()}")
    except Exception as error:
        raise RuntimeError(f"no CUDA kernels for {arch}: {error}") from error


BITMAP, SEMI24 = "bitmap", "2:4"
KINDS = (BITMAP, SEMI24)
"""The kinds of weights that have kernels; a process loads those of a kind when it first needs them."""


def sources_for(capability: tuple[int, int], kind: str) -> tuple[str, ...]:
    """The source files whose kernels a GPU runs on weights of a kind."""
    if kind == BITMAP:
        return ("sm80_bf16_bitmap_linear", "sm80_fp16_bitmap_linear")
    generation = "sm90" if capability == (9, 0) else "sm80"
    return ("semi24_pack", f"{generation}_bf16_semi24_gemm", f"{generation}_fp16_semi24_gemm")


@functools.cache
def usable(device: int, kind: str) -> bool:
    """Whether the kernels of a kind load on a device; if not, one warning says why, and the other backends serve."""
    try:
        for source in sources_for(torch.cuda.get_device_capability(device), kind):
            _origins[device, kind] = module(source, device).origin
    except (RuntimeError, ImportError) as error:
        _origins[device, kind] = f"none: {error}"
        _warn_once(f"The CUDA kernels for {kind} weights cannot be used: {error}")
        return False
    return True


def origin(device: int) -> str:
    """Which of cubin, NVRTC and none serves a device, in words; kind by kind where they differ."""
    for kind in KINDS:
        usable(device, kind)
    found = {kind: _origins[device, kind] for kind in KINDS}
    if len(set(found.values())) == 1:
        return found[BITMAP]
    return ", ".join(f"{kind} weights {where}" for kind, where in found.items())
