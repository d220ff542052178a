"""`python -m bench.generation`: greedy generation on packed weights against transformers on dense ones.

Every contestant runs in a fresh process, in turns (A B C A B C); medians. The packed model's logits on the prompt must
agree with the dense model's of the same dtype up to rounding. The rows are kept in bench/results/generation.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from bench import machine, results, table
from bench.generation.subjects import SUBJECTS, Subject
from bench.generation.worker import Job
from bench.results import Row
from perp import demo

OP, OURS = "generate", "packed bf16"
CONTESTANTS = {
    OURS: (True, "bfloat16"),
    "transformers bf16": (False, "bfloat16"),
    "transformers fp32": (False, "float32"),
}
PROMPT = 16
WIDTH = 180

Measured = tuple[dict[str, Any], Tensor]


def in_a_process_of_its_own(job: Job) -> Measured:
    """What `bench.generation.worker` measures, and the logits of the prompt; CalledProcessError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job.to_json()))
        subprocess.run([sys.executable, "-m", "bench.generation.worker", str(path)], cwd=machine.ROOT, check=True)
        found = json.loads(path.with_name("result.json").read_text())
        return found, load_file(path.with_name("logits.safetensors"))["logits"]


def measure(
    subject: Subject,
    directory: Path,
    tokens: int,
    rounds: int,
    threads: int,
    run: Callable[[Job], Measured] = in_a_process_of_its_own,
) -> list[Row]:
    """The subject's rows: tokens per second, and resident bytes."""
    prompt = _prompt(directory)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    logits: dict[str, Tensor] = {}
    for turn in range(rounds):
        for name, (packed, dtype) in CONTESTANTS.items():
            one, logits[name] = run(Job(str(directory), packed, dtype, prompt, tokens, 1, threads))
            found[name].append(one)
            print(
                f"{subject.name}, round {turn + 1}, {name}: {one['tokens_per_second']:.2f} tokens/s, "
                f"{one['resident_bytes'] / 1e6:.0f} MB resident (own {one['own_bytes'] / 1e6:.0f}), "
                f"weights {one['weight_bytes'] / 1e6:.0f} MB",
                file=sys.stderr,
            )

    def medians(what: str) -> dict[str, float]:
        return {name: statistics.median(one[what] for one in ones) for name, ones in found.items()}

    rates, memory = medians("tokens_per_second"), medians("resident_bytes")
    peer = max((name for name in CONTESTANTS if name != OURS), key=lambda name: rates[name])
    verified = agree(logits[OURS], logits["transformers bf16"], logits["transformers fp32"])

    def row(figures: dict[str, float], unit: str, better: str, target: float) -> Row:
        return Row(
            op=OP,
            kernel=found[OURS][0]["kernel"],
            shape=f"{subject.name} 50 %, {tokens} tokens after {len(prompt)}",
            dtype="bfloat16",
            device=found[OURS][0]["device"],
            commit=machine.commit(),
            ours=figures[OURS],
            peers={name: figure for name, figure in figures.items() if name != OURS},
            unit=unit,
            better=better,
            target=target * figures[peer],
            limit=None,
            peak_bytes=round(memory[OURS]),
            verified=verified,
        )

    return [row(rates, "tokens/s", "higher", subject.speed), row(memory, "bytes", "lower", subject.memory)]


def agree(ours: Tensor, same: Tensor, exact: Tensor) -> bool:
    """Whether logits of the packed model are as near to those in fp32 as the dense model's of its dtype are."""
    if not bool(ours.isfinite().all()):
        return False
    return bool((ours - exact).norm() <= 1.5 * (same - exact).norm())


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """`new`, and the `old` rows of other devices and shapes."""
    replaced = {(row.device, row.shape) for row in new}
    kept = [row for row in old if (row.device, row.shape) not in replaced]
    return sorted([*kept, *new], key=lambda row: (row.device, row.unit, row.shape))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where the logits do not agree, 2 for a wrong option."""
    options = _parser().parse_args(arguments)
    names = options.models.split(",")
    if unknown := [name for name in names if name not in SUBJECTS]:
        print(f"there is no model {unknown[0]!r} to run: choose among {', '.join(SUBJECTS)}.", file=sys.stderr)
        return 2
    if min(options.tokens, options.rounds, options.threads) < 1:
        print("--tokens, --rounds and --threads must be at least 1.", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for name in names:
        directory = SUBJECTS[name].directory(options.cache or demo.cache_dir() / "bench" / "generation")
        rows += measure(SUBJECTS[name], directory, options.tokens, options.rounds, options.threads)
        results.write(options.out, merge(results.read(options.out), rows))
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    for shown in table.tables(rows):
        console.print(shown)
    console.print(f"The rows are in {options.out}.")
    return 0 if all(row.verified for row in rows) else 1


def _prompt(directory: Path) -> list[int]:
    """The same few tokens for everybody, within the model's vocabulary."""
    known = json.loads((directory / "config.json").read_text())["vocab_size"]
    return [(1000 + 337 * place) % known for place in range(PROMPT)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.generation", description=__doc__)
    parser.add_argument("--models", default=",".join(SUBJECTS), help=f"of {', '.join(SUBJECTS)} (default: all)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="fresh processes of each contestant (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of everybody (default: torch's)")
    parser.add_argument("--cache", type=Path, help="where the pruned models are kept (default: perp's cache)")
    parser.add_argument(
        "--out", type=Path, default=results.FOLDER / "generation.json", help="results file (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
