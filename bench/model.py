"""A whole model pruned from end to end, forward passes included, its weights random: the time does not depend on them.

python -m bench.model --device cuda           SparseGPT and Wanda at 2:4, 128 windows of 2048 tokens, 8B parameters
python -m bench.model --size tiny             the same on a CPU, in a moment
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench import device, machine, results
from bench.results import Row
from perp.machine import peak, reset_peak
from perp.prune import Pruned, prune_model
from perp_kernels import dispatch

OP = "prune_model"
PATTERN = "2:4"
TARGETS = {"sparsegpt": 60.0, "wanda": 30.0}
"""Seconds, on one H100."""


@dataclass(frozen=True)
class Size:
    """A decoder, and the calibration windows that it is pruned on."""

    configuration: dict[str, Any]
    windows: int
    seqlen: int
    dtype: torch.dtype


SIZES = {
    "8B": Size(
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
        },
        windows=128,
        seqlen=2048,
        dtype=torch.bfloat16,
    ),
    "tiny": Size(
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 96,
        },
        windows=2,
        seqlen=16,
        dtype=torch.float32,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a mask is not the pattern's."""
    options = _parser().parse_args(arguments)
    device.use(options.device)
    size = SIZES[options.size]
    rows, wrong = [], False
    for method in options.methods.split(","):
        # The kernels are compiled, and the libraries set up, by one block of the same widths.
        _timed(_build(size, blocks=1), _windows(size, 2), method)
        seconds, pruned, bytes_, kernel = _timed(_build(size), _windows(size, size.windows), method)
        kept = all(bool((mask.view(-1, 4).sum(1) == 2).all()) for mask in pruned.masks.values())
        wrong = wrong or not kept
        rows.append(
            Row(
                op=OP,
                kernel=kernel,
                shape=f"method={method} model={options.size} windows={size.windows}x{size.seqlen} pattern={PATTERN}",
                dtype=str(size.dtype).removeprefix("torch."),
                device=machine.device(),
                commit=machine.commit(),
                ours=seconds,
                peers={},
                unit="s",
                better="lower",
                target=TARGETS[method] if options.size == "8B" else None,
                limit=None,
                peak_bytes=bytes_,
                verified=options.tests_passed and kept,
            )
        )
        print(f"{rows[-1].shape}: {seconds:.1f} s", file=sys.stderr)
    results.write(options.out, results.merge(results.read(options.out), rows))
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", default=",".join(TARGETS), help="separated by commas")
    parser.add_argument("--size", choices=SIZES, default="8B")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="results file")
    parser.add_argument("--tests-passed", action="store_true", help="the kernels' tests are known to pass")
    return parser


def _build(size: Size, blocks: int | None = None) -> PreTrainedModel:
    changes = {} if blocks is None else {"num_hidden_layers": blocks}
    configuration = AutoConfig.for_model("llama", **{**size.configuration, **changes})
    with device.current():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(configuration, dtype=size.dtype)


def _windows(size: Size, count: int) -> Tensor:
    return torch.randint(
        size.configuration["vocab_size"], (count, size.seqlen), generator=torch.Generator().manual_seed(0)
    )


def _timed(model: PreTrainedModel, windows: Tensor, method: str) -> tuple[float, Pruned, int, str]:
    """(seconds, what was pruned, bytes of memory beyond the model's at the peak, the implementations that served)."""
    name = str(device.current())
    _wait()
    reset_peak(name)
    before = peak(name)
    started = time.perf_counter()
    with dispatch.served() as served:
        pruned = prune_model(model, windows, method, PATTERN)
        _wait()
    seconds = time.perf_counter() - started
    kernel = "+".join(sorted({backend for _, backend in served}))
    return seconds, pruned, max(0, round((peak(name) - before) * 1e9)), kernel


def _wait() -> None:
    if device.on_gpu():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
