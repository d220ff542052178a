"""Find this GPU's launch configurations: the fastest of a few that compile, fit and give the right result.

    python -m bench.tune                        every kernel; writes perp_kernels/tuning/sm_ARCH.json
    python -m bench.tune --ops gram_,select     the kernels of these ops; the rest of the file stays

Each subject is one launcher at one kind of call, named by the key that it asks `configure` for. The file is written
after each, so that an interruption keeps what was found. A candidate has to be faster than the default by MARGIN: what
is not, is left to the default, which other versions of Triton may suit better.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench import device, results, timing
from bench.inputs import generator, normal, pruned_weight
from bench.timing import Stopwatch
from perp_kernels.pattern import Pattern
from perp_kernels.triton import launch

MARGIN = 1.03
REPEATS = 7

Call = Callable[[], Any]
Candidate = Mapping[str, int]


def _grid(**choices: Sequence[int]) -> list[dict[str, int]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


# num_stages only where a loop's loads feed a product: elsewhere Triton has nothing to pipeline.
SPACES: dict[str, list[dict[str, int]]] = {
    "gram": _grid(BLOCK=(128,), BT=(32, 64, 128), num_warps=(4, 8), num_stages=(3, 4, 5)),
    "adapter_gradients": [
        {**tile, **rest}
        for tile in ({"BN": 128, "BK": 128}, {"BN": 128, "BK": 256}, {"BN": 256, "BK": 128})
        for rest in _grid(BT=(32, 64), num_warps=(4, 8), num_stages=(3, 4))
    ],
    "value_gradient": _grid(BN=(64, 128), BK=(64, 128), BT=(64,), num_warps=(4, 8), num_stages=(3, 4)),
    "effective": _grid(BN=(16, 32, 64), BK=(128, 256), num_warps=(4, 8)),
    "few_tokens": _grid(BN=(16, 32, 64), BK=(128, 256, 512), num_warps=(4, 8)),
    "prune_block": _grid(BN=(8, 16, 32, 64), num_warps=(2, 4, 8)),
    "select_groups": _grid(GROUPS=(128, 256, 512, 1024), num_warps=(2, 4, 8)),
    "select_row": _grid(PART=(1024, 2048, 4096), num_warps=(4, 8, 16)),
}


@dataclass(frozen=True)
class Subject:
    """A call of one launcher: `make` builds its tensors and gives the call, which returns what it computed."""

    op: str
    kernel: str
    make: Callable[[], Call]


@dataclass(frozen=True)
class Found:
    """The best candidate for calls of kind `key`, None where none beats the default; seconds of a call."""

    key: str
    values: Candidate | None
    seconds: float
    default_seconds: float


def search(kernel: str, call: Call, candidates: Iterable[Candidate], elapsed: Stopwatch) -> Found:
    """The fastest configuration of `kernel` for this call, of those whose result is the default's but for rounding."""
    with launch.observing() as (configured, _):
        call()
    asked = next(one for one in configured if one.kernel == kernel)
    with launch.override(**{kernel: asked.default.values()}):
        expected = call()
        default = _seconds(call, elapsed)
    best: tuple[float, Candidate | None] = (default / MARGIN, None)
    for candidate in candidates:
        seconds = _try(kernel, call, candidate, expected, elapsed)
        if seconds is not None and seconds < best[0]:
            best = (seconds, candidate)
    return Found(asked.key, best[1], best[0] if best[1] else default, default)


def _try(kernel: str, call: Call, candidate: Candidate, expected: Any, elapsed: Stopwatch) -> float | None:
    """Seconds of the call under `candidate`; None where it does not compile, fit, or give the right result."""
    with launch.override(**{kernel: candidate}), launch.observing() as (_, compiled):
        try:
            result = call()
        except Exception as error:
            # A candidate may fail in Triton's compiler, in ptxas or at the launch, each with exceptions of its own.
            if isinstance(error, torch.AcceleratorError):
                raise
            print(f"  {_words(candidate)}: {type(error).__name__}", file=sys.stderr)
            return None
        if any(getattr(built, "n_spills", 0) for built in compiled):
            print(f"  {_words(candidate)}: spills", file=sys.stderr)
            return None
        if not close(result, expected):
            print(f"  {_words(candidate)}: WRONG", file=sys.stderr)
            return None
        return _seconds(call, elapsed)


def _seconds(call: Call, elapsed: Stopwatch) -> float:
    call()
    return statistics.median(elapsed(call) for _ in range(REPEATS))


def close(result: Any, expected: Any) -> bool:
    """Whether two results differ by no more than another order of summation makes them."""
    for one, other in zip(tree_leaves(result), tree_leaves(expected), strict=True):
        if not other.is_floating_point():
            if not torch.equal(one, other):
                return False
        elif other.numel():
            bound = 16 * torch.finfo(other.dtype).eps * other.abs().max()
            if not bool((one - other).abs().max() <= bound):
                return False
    return True


def subjects(scale: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[Subject]:
    """The calls that are tuned, the longest-running of a training step first. Tests divide all sizes by `scale`."""
    from perp_kernels.ops._adapted import Added
    from perp_kernels.ops._rows import PackedRows
    from perp_kernels.triton import effective, gradient, gram, select, sparse_linear, sparsegpt

    N, K = 4096 // scale, 11008 // scale

    def weight(layout: str, rows: int = N, columns: int = K) -> PackedRows:
        pattern = "2:4" if layout == "semi24" else "0.5"
        packed = pruned_weight(rows, columns, pattern, layout, dtype, generator(0)).packed
        return PackedRows(packed.values, packed.index, packed.row_ptr, layout, columns)

    def adapter(r: int) -> effective.Adapter:
        random = generator(1)
        return effective.Adapter(Added(2.0), normal((r, K), dtype, random) / K, normal((N, r), dtype, random))

    def gradients(T: int, layout: str) -> Call:
        w, adapted, random = weight(layout), adapter(16), generator(2)
        T //= scale
        dy, x = normal((T, N), dtype, random), normal((T, K), dtype, random)

        def call() -> tuple[Tensor, Tensor]:
            dA, dB = (torch.zeros(s, device=x.device) for s in ((16, K), (N, 16)))
            gradient.adapter_gradients(dy, x, w, adapted, dA, dB)
            return dA, dB

        return call

    def effective_weight(layout: str) -> Call:
        w, adapted = weight(layout), adapter(16)
        return lambda: effective.effective_weight(w, adapted)

    def values(T: int) -> Call:
        w, random = weight("bitmap"), generator(2)
        T //= scale
        dy, x = normal((T, N), dtype, random), normal((T, K), dtype, random)

        def call() -> Tensor:
            out = torch.zeros_like(w.values)
            gradient.value_gradient(dy, x, w, out)
            return out

        return call

    def square(width: int) -> Call:
        width //= scale
        x = normal((8192 // scale, width), dtype, generator(2))

        def call() -> Tensor:
            H = torch.zeros(width, width, device=x.device)
            gram.gram_(H, x, None)
            return H

        return call

    def few(T: int, layout: str) -> Call:
        w, x = weight(layout), normal((T, K), dtype, generator(2))

        def call() -> Tensor:
            out = x.new_empty(T, N)
            sparse_linear.few_tokens(x, w, None, out)
            return out

        return call

    def block() -> Call:
        columns, factor = normal((N, 128), torch.float32, generator(2)), torch.eye(128, device=device.current())

        def call() -> tuple[Tensor, Tensor]:
            W, errors = columns.clone(), torch.empty_like(columns)
            kept = torch.empty(W.shape, dtype=torch.bool, device=W.device)
            sparsegpt.sparsegpt_block_(W, factor + 0.01, "2:4", errors, kept)
            return W, kept

        return call

    def chosen(pattern: str) -> Call:
        scores = normal((N, 4096 // scale), torch.float32, generator(2))
        return lambda: select.choose(scores, Pattern.parse(pattern))[0]

    masked, linear = "masked_lora_linear", "sparse_linear"
    return [
        *(Subject(masked, "adapter_gradients", partial(gradients, T, "bitmap")) for T in (4096, 1024)),
        *(Subject(masked, "effective", partial(effective_weight, layout)) for layout in ("bitmap", "semi24", "dense")),
        Subject(masked, "adapter_gradients", partial(gradients, 4096, "dense")),
        *(Subject("gram_", "gram", partial(square, K)) for K in (4096, 8192, 14336)),
        *(Subject(linear, "few_tokens", partial(few, T, "bitmap")) for T in (1, 8, 16, 64)),
        *(Subject(linear, "few_tokens", partial(few, T, "semi24")) for T in (1, 16)),
        Subject("sparsegpt_block_", "prune_block", block),
        Subject("select", "select_groups", partial(chosen, "2:4")),
        Subject("select", "select_row", partial(chosen, "0.5")),
        Subject(linear, "value_gradient", partial(values, 4096)),
    ]


def tune(chosen: Iterable[Subject], path: Path, elapsed: Stopwatch, deadline: float) -> None:
    """Search for each subject until the deadline, and keep what is found in the file at `path`."""
    for subject in chosen:
        if time.monotonic() > deadline:
            print(f"{subject.op} {subject.kernel}: not searched, the time was up", file=sys.stderr)
            continue
        found = search(subject.kernel, subject.make(), SPACES[subject.kernel], elapsed)
        keep(path, subject.kernel, found)
        words = _words(found.values) if found.values else "the default"
        gain = f"{1e6 * found.default_seconds:.1f} -> {1e6 * found.seconds:.1f} us"
        print(f"{subject.kernel} [{found.key}]: {words}, {gain}", flush=True)


def keep(path: Path, kernel: str, found: Found) -> None:
    """Put what was found into the file that `configure` reads, in the place of what it held of that kind of call."""
    held = json.loads(path.read_text()) if path.exists() else {}
    of_kernel = {key: values for key, values in held.get(kernel, {}).items() if key != found.key}
    if found.values is not None:
        of_kernel[found.key] = dict(found.values)
    kept = {**held, kernel: dict(sorted(of_kernel.items()))}
    results.write_json(path, {name: kept[name] for name in sorted(kept) if kept[name]})


def _words(candidate: Candidate) -> str:
    return " ".join(f"{name}={value}" for name, value in candidate.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 2 for a wrong option or without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ops", help="the kernels of these ops only, separated by commas")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no search after so many")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no GPU that torch sees: run this where there is one.", file=sys.stderr)
        return 2
    device.use("cuda")
    known = subjects()
    ops = options.ops.split(",") if options.ops else sorted({subject.op for subject in known})
    if unknown := [op for op in ops if op not in {subject.op for subject in known}]:
        print(f"{unknown[0]!r} has no kernel to tune: choose of {', '.join({s.op for s in known})}.", file=sys.stderr)
        return 2
    arch = launch.target(torch.empty(0, device="cuda")).arch
    deadline = time.monotonic() + 60 * options.minutes
    tune([s for s in known if s.op in ops], launch.TUNING / f"sm_{arch}.json", timing.stopwatch(), deadline)
    return 0


if __name__ == "__main__":
    sys.exit(main())
