"""What nvcc makes of the CUDA kernels: registers, spills, shared memory and the sparse instructions, without a GPU.

`python -m bench.cuda_resources` writes bench/results/cuda-resources.md. nvcc is looked for on PATH and in CUDA_HOME or
/usr/local/cuda; cuobjdump there or in an installed Triton, whose wheel brings one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from perp_kernels.cuda import load, plans

BUILDS = {
    "semi24_pack": ("sm_80", "sm_90a", "sm_100"),
    "sm80_bf16_semi24_gemm": ("sm_80", "sm_100"),
    "sm80_fp16_semi24_gemm": ("sm_80", "sm_100"),
    "sm90_bf16_semi24_gemm": ("sm_90a",),
    "sm90_fp16_semi24_gemm": ("sm_90a",),
}
"""The cubins of CMakeLists.txt: source -> architectures."""

INSTRUCTION = {"sm80": r"HMMA\.SP\.16832\S*", "sm90": r"HGMMA\.SP\.64x\d+x32\S*"}
"""What a product has to show in machine code, by the first part of its source's name."""

SHARED = {suffix: shape.shared for suffix, shape in plans.SHAPES_90.items()} | {
    shape.suffix: shape.shared for shape in plans.SHAPES_80
}


@dataclass(frozen=True)
class Resources:
    """One kernel for one architecture; `instructions` is None where there is no cuobjdump to look for them."""

    kernel: str
    arch: str
    registers: int
    spilled: int
    stack: int
    shared: int
    instructions: tuple[str, ...] | None


def _tool(name: str, extra: Path | None = None) -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(str(p) for p in (home, extra) if p))


@functools.cache
def nvcc() -> str | None:
    return _tool("nvcc")


@functools.cache
def cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    origin = None if triton is None or triton.origin is None else Path(triton.origin).parent
    return _tool("cuobjdump", origin and origin / "backends" / "nvidia" / "bin")


def _instructions(cubin: Path, pattern: str) -> dict[str, tuple[str, ...]] | None:
    """For each kernel of a cubin, the instructions that match, each kind once."""
    tool = cuobjdump()
    if tool is None:
        return None
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    _, *parts = re.split(r"Function : (\w+)", text)
    bodies = zip(parts[::2], parts[1::2], strict=True)
    return {kernel: tuple(sorted(set(re.findall(pattern, body)))) for kernel, body in bodies}


def compile_source(source: str, arch: str) -> tuple[list[Resources], str]:
    """Every kernel of a source, and all that the compiler said. Raises where it refuses."""
    compiler = nvcc()
    assert compiler is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        target = f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}"
        command = [
            compiler,
            "-cubin",
            "-std=c++17",
            target,
            "-Xptxas",
            "-v",
            "-o",
            cubin,
            load.SOURCES / f"{source}.cu",
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        log = done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError(f"nvcc refuses {source} for {arch}: {log}")
        found = _instructions(cubin, INSTRUCTION.get(source[:4], "(?!)"))
    pattern = (
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    kernels = []
    for kernel, stack, stores, loads, registers in re.findall(pattern, log, re.DOTALL):
        shared = SHARED.get(kernel.partition("gemm_")[2], 0)
        kinds = None if found is None else found.get(kernel, ())
        kernels.append(Resources(kernel, arch, int(registers), int(stores) + int(loads), int(stack), shared, kinds))
    return sorted(kernels, key=lambda one: one.kernel), log


def table() -> str:
    lines = [
        "# Registers and shared memory of the CUDA kernels",
        "",
        "Compiled by nvcc without a GPU; speed: not measured. Written by `python -m bench.cuda_resources`.",
        "",
        "| kernel | for | registers | spilled bytes | shared bytes | sparse instructions |",
        "|---|---|---:|---:|---:|---|",
    ]
    for source, archs in BUILDS.items():
        for arch in archs:
            for one in compile_source(source, arch)[0]:
                found = "not looked for" if one.instructions is None else ", ".join(one.instructions) or "-"
                cells = (one.kernel, one.arch, one.registers, one.spilled, one.shared, found)
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "results" / "cuda-resources.md").write_text(table())
