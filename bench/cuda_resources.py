"""What nvcc makes of the CUDA kernels: registers, spills, shared memory and the tensor cores' instructions, without a
GPU; and how many instructions the decoding of a bitmap takes for each weight.

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

from perp_kernels.cuda import bitmap_plans, load, plans

BUILDS = {
    "semi24_pack": ("sm_80", "sm_90a", "sm_100"),
    "sm80_bf16_bitmap_linear": ("sm_80", "sm_90a", "sm_100"),
    "sm80_fp16_bitmap_linear": ("sm_80", "sm_90a", "sm_100"),
    "sm80_bf16_semi24_gemm": ("sm_80", "sm_100"),
    "sm80_fp16_semi24_gemm": ("sm_80", "sm_100"),
    "sm90_bf16_semi24_gemm": ("sm_90a",),
    "sm90_fp16_semi24_gemm": ("sm_90a",),
}
"""The cubins of CMakeLists.txt: source -> architectures."""

INSTRUCTION = {
    "bitmap_linear": r"HMMA\.16816\.\S*",
    "sm80_semi24_gemm": r"HMMA\.SP\.16832\S*",
    "sm90_semi24_gemm": r"HGMMA\.SP\.64x\d+x32\S*",
}
"""What a product has to show in machine code, by its family."""

SHARED = (
    {shape.suffix: shape.shared for shape in bitmap_plans.SHAPES}
    | {shape.suffix: shape.shared for shape in plans.SHAPES_80}
    | {shape.suffix: shape.shared for shape in plans.SHAPES_90.values()}
)


def family(source: str) -> str | None:
    """The key of `INSTRUCTION` for the products of a source, None where it has none."""
    if source.endswith("bitmap_linear"):
        return "bitmap_linear"
    return f"{source[:4]}_semi24_gemm" if source.endswith("semi24_gemm") else None


@dataclass(frozen=True)
class Resources:
    """One kernel for one architecture; `instructions` is None where there is no cuobjdump to look for them, and
    `per_weight` where it is no decoding kernel either."""

    kernel: str
    arch: str
    registers: int
    spilled: int
    stack: int
    shared: int
    instructions: tuple[str, ...] | None
    per_weight: float | None


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


def machine_code(cubin: Path) -> dict[str, list[tuple[int, str]]] | None:
    """For each kernel of a cubin its instructions in order, by address; None where there is no cuobjdump."""
    tool = cuobjdump()
    if tool is None:
        return None
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    _, *parts = re.split(r"Function : (\w+)", text)
    line = r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;"
    return {
        kernel: [(int(address, 16), code) for address, code in re.findall(line, body)]
        for kernel, body in zip(parts[::2], parts[1::2], strict=True)
    }


def main_loop(code: list[tuple[int, str]]) -> list[str]:
    """The instructions of the one loop with a product in it."""
    loops = []
    for address, text in code:
        jump = re.search(r"BRA\S*\s+.*?0x([0-9a-f]+)", text)
        if jump is not None and int(jump[1], 16) < address:
            loop = [text for at, text in code if int(jump[1], 16) <= at <= address]
            loops += [loop] if any("MMA" in text for text in loop) else []
    (only,) = loops
    return only


def per_weight(kernel: str, code: list[tuple[int, str]]) -> float | None:
    """Instructions that a thread of a decoding kernel issues for each weight: its main loop's, over the 32 that are its
    share of a step."""
    shape = next((shape for shape in bitmap_plans.SHAPES if kernel.endswith(f"bitmap_linear_{shape.suffix}")), None)
    if shape is None:
        return None
    return len(main_loop(code)) / (shape.rows * shape.columns / bitmap_plans.THREADS)


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
        code = machine_code(cubin)
    product = re.compile(INSTRUCTION.get(family(source) or "", "(?!)"))
    pattern = (
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    kernels = []
    for kernel, stack, stores, loads, registers in re.findall(pattern, log, re.DOTALL):
        shared = next((SHARED[suffix] for suffix in SHARED if kernel == f"{source}_{suffix}"), 0)
        kinds, share = None, None
        if code is not None:
            found = (product.search(text) for _, text in code[kernel])
            kinds = tuple(sorted({match[0] for match in found if match}))
            share = per_weight(kernel, code[kernel])
        numbers = int(registers), int(stores) + int(loads), int(stack), shared
        kernels.append(Resources(kernel, arch, *numbers, kinds, share))
    return sorted(kernels, key=lambda one: one.kernel), log


def table() -> str:
    lines = [
        "# Registers and shared memory of the CUDA kernels",
        "",
        "Compiled by nvcc without a GPU; speed: not measured. Written by `python -m bench.cuda_resources`.",
        "",
        "Instructions a weight: those of the loop that decodes and multiplies, for each weight that a thread decodes.",
        "",
        "| kernel | for | registers | spilled bytes | shared bytes | on tensor cores | instructions a weight |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    for source, archs in BUILDS.items():
        for arch in archs:
            for one in compile_source(source, arch)[0]:
                found = "not looked for" if one.instructions is None else ", ".join(one.instructions) or "-"
                share = "-" if one.per_weight is None else f"{one.per_weight:.1f}"
                cells = (one.kernel, one.arch, one.registers, one.spilled, one.shared, found, share)
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "results" / "cuda-resources.md").write_text(table())
