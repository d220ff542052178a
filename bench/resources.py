"""What the Triton kernels take of a chip, found by compiling them: no GPU is needed.

    python -m bench.resources     writes bench/results/triton-resources.md

Each case runs an op's launcher on tensors without data, and the launches it records are compiled for each architecture
with the very configurations they would have run with.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perp_kernels.pattern import Pattern
from perp_kernels.triton.launch import Launch, Target, recording

TARGETS = (Target(80, 108), Target(90, 132), Target(100, 148))

# Bytes of shared memory that one program can have (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}

# The instructions of the tensor cores, the chip's own first.
TENSOR_CORE = {80: ("mma.sync",), 90: ("wgmma.mma_async", "mma.sync"), 100: ("tcgen05.mma", "mma.sync")}

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture. `tensor_core` is the instruction its products take, "" for none."""

    kernel: str
    arch: int
    config: str
    tensor_core: str
    registers: int
    spilled: int
    shared: int


def built(launched: Launch, target: Target) -> Any:
    """What Triton would compile for this launch: integers that are 1 or divisible by 16 are known to be so."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config = launched.config
    names, known = launched.kernel.arg_names, {**launched.switches, **config.tiles}
    signature, divisible = {}, {}
    for position, name in enumerate(names):
        value: Any = known.get(name, launched.arguments.get(name))
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif name in known or value == 1:
            known[name] = value
            signature[name] = "constexpr"
            continue
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if not isinstance(value, float) and (isinstance(value, Tensor) or value % 16 == 0):
            divisible[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launched.kernel, signature, known, divisible)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", target.arch, 32), options=options)


def compile_launch(launched: Launch, target: Target) -> Compiled:
    """Compile a launch, and read off what it takes."""
    compiled, config = built(launched, target), launched.config
    registers, spilled = _usage(compiled.asm["cubin"])
    found = [i for i in TENSOR_CORE[target.arch] if i in compiled.asm["ptx"]]
    tiles = " ".join(f"{name}={value}" for name, value in config.tiles.items())
    return Compiled(
        launched.kernel.__name__,
        target.arch,
        f"{tiles} warps={config.num_warps} stages={config.num_stages}",
        found[0] if found else "",
        registers,
        spilled,
        compiled.metadata.shared,
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack and local memory), as the assembler recorded them."""
    import triton

    tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _weight(N: int, K: int, layout: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """The components of a weight pruned by half, without data."""
    columns = K if layout == "dense" else K // 2
    return (
        torch.empty(N, columns, dtype=dtype, device="meta"),
        torch.empty(N, (K + 7) // 8, dtype=torch.uint8, device="meta"),
        None,
        layout,
    )


def _rows(tokens: int, K: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(tokens, K, dtype=dtype, device="meta")


def _call(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return partial(function, *arguments)


def cases(dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, a call of an op's launcher) at shapes that the benchmarks report."""
    from perp_kernels.triton import adapted, gram, select, sparse_linear, sparsegpt, swap_round, unpack

    for K in (4096, 14336):
        H = torch.empty(K, K, device="meta")
        yield f"gram_ K={K}", _call(gram.gram_, H, _rows(16384, K, dtype), None)
    for N, K in ((4096, 4096), (8192, 28672)):
        scores = _rows(N, K, torch.float32)
        yield f"select 2:4 {N}x{K}", _call(select.choose, scores, Pattern.parse("2:4"))
        yield f"select 0.5/row {N}x{K}", _call(select.choose, scores, Pattern.parse("0.5/row"))
    weight, norms = _rows(4096, 4096, dtype), torch.empty(4096, device="meta")
    for pattern in ("2:4", "0.5/row"):
        yield f"wanda_select {pattern} 4096x4096", _call(select.choose, weight, Pattern.parse(pattern), norms)
    columns, factor, errors = (
        _rows(rows, K, torch.float32)[:, :128] for rows, K in ((4096, 4096), (128, 128), (4096, 128))
    )
    kept = columns.new_empty(4096, 4096, dtype=torch.bool)[:, :128]
    for pattern in ("2:4", "0.5/row"):
        yield f"sparsegpt {pattern} b=128", _call(sparsegpt.sparsegpt_block_, columns, factor, pattern, errors, kept)
    for N, K, pattern in ((1024, 4096, "0.6"), (4096, 14336, "0.6"), (4096, 4096, "2:4")):
        state = _rows(N, K, dtype), _rows(N, K, torch.bool), _rows(N, K, torch.float32), _rows(K, K, torch.float32)
        yield f"swap_round_ {pattern} {N}x{K}", _call(swap_round.swap_round_, *state, pattern)
    N, K, T = 4096, 11008, 4096
    shape, dy, x = [N, K], _rows(T, N, dtype), _rows(T, K, dtype)
    for layout in ("bitmap", "semi24"):
        w = _weight(N, K, layout, dtype)
        yield f"unpack {layout}", _call(unpack.unpack, *w[:3], K, layout)
        for tokens in (1, 64):
            few = _rows(tokens, K, dtype)
            yield (
                f"sparse_linear {layout} T={tokens}",
                _call(sparse_linear.sparse_linear, few, *w, shape, None, None),
            )
        needs = [False, True, False]
        yield (
            f"sparse_linear_backward {layout}",
            _call(sparse_linear.sparse_linear_backward, dy, x, *w, shape, None, needs),
        )
    needs = [True, True, True, False]
    for layout in ("bitmap", "semi24", "dense"):
        w = _weight(N, K, layout, dtype)
        adapter_kinds = [(16, dtype), (16, torch.float32), (128, dtype)]
        for r, adapters in adapter_kinds if layout == "bitmap" else adapter_kinds[:1]:
            A, B = _rows(r, K, adapters), _rows(N, r, adapters)
            suffix = f"{layout} r={r}" + (" fp32" if adapters != dtype else "")
            yield (
                f"masked_lora_linear {suffix}",
                _call(adapted.masked_lora_linear_backward, dy, x, *w, shape, A, B, 1.5, None, needs),
            )
            if layout == "bitmap":
                yield f"add_lowrank_ {suffix}", _call(adapted.add_lowrank_, *w, shape, A, B, 1.5)
        A, B = _rows(16, K, dtype), _rows(N, 16, dtype)
        yield (
            f"scale_lora_linear {layout} r=16",
            _call(adapted.scale_lora_linear_backward, dy, x, *w, shape, A, B, None, needs),
        )


def single(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Calls of the launchers at sizes of one: an output, a token, a rank, a byte of index."""
    from perp_kernels.triton import adapted, gram, select, sparse_linear, sparsegpt, unpack

    N, K, T, r = 1, 8, 1, 1
    shape, x, dy, needs = [N, K], _rows(T, K, dtype), _rows(T, N, dtype), [True, True, True, False]
    for layout in ("bitmap", "dense"):
        w = _weight(N, K, layout, dtype)
        A, B = _rows(r, K, dtype), _rows(N, r, dtype)
        yield _call(adapted.masked_lora_linear_backward, dy, x, *w, shape, A, B, 1.0, None, needs)
        yield _call(adapted.scale_lora_linear_backward, dy, x, *w, shape, A, B, None, needs)
        yield _call(adapted.add_lowrank_, *w, shape, A, B, 1.0)
        yield _call(sparse_linear.sparse_linear, x, *w, shape, None, None)
        yield _call(sparse_linear.sparse_linear_backward, dy, x, *w, shape, None, [False, True, False])
        yield _call(unpack.unpack, *w[:3], K, layout)
    yield _call(gram.gram_, torch.empty(1, 1, device="meta"), _rows(1, 1, dtype), None)
    yield _call(select.choose, _rows(1, 1, torch.float32), Pattern.parse("0.5/row"))
    block = _rows(1, 1, torch.float32)
    yield _call(sparsegpt.sparsegpt_block_, block, block, "0.5/row", block, block.new_empty(1, 1, dtype=torch.bool))


def launches(call: Callable[[], Any], target: Target) -> list[Launch]:
    """The launches of a call, each kind once."""
    with recording(target) as recorded:
        call()
    kinds: dict[Any, Launch] = {}
    for launched in recorded:
        numbers = {k: v if isinstance(v, int | float) else None for k, v in launched.arguments.items()}
        key = (launched.kernel.__name__, tuple(launched.switches.items()), launched.config.num_warps)
        kinds.setdefault((*key, tuple(n % 16 == 0 for n in numbers.values() if isinstance(n, int))), launched)
    return list(kinds.values())


def table() -> str:
    import triton

    lines = [
        "# Registers and shared memory of the Triton kernels",
        "",
        f"bfloat16, compiled by Triton {triton.__version__} without a GPU; speed: not measured. Written by"
        " `python -m bench.resources`.",
        "",
        "| call | kernel | sm | configuration | product | registers | spilled bytes | shared bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, call in cases():
        for target in TARGETS:
            for launched in launches(call, target):
                c = compile_launch(launched, target)
                cells = (name, c.kernel, c.arch, c.config, c.tensor_core or "-", c.registers, c.spilled, c.shared)
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "results" / "triton-resources.md").write_text(table())
