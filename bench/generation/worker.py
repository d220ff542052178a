"""One contestant in a process of its own: `python -m bench.generation.worker JOB.json`, the result beside the job.

Its resident memory is then its own, and no contestant finds the caches that another has warmed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from bench import machine as bench_machine
from bench.results import write_json
from perp import machine, models, packed_model
from perp_kernels import cpu, dispatch

WARMUP = 4


@dataclass(frozen=True)
class Job:
    """A model directory, whether on its packed weights, in which dtype; the prompt's ids, how many tokens to generate
    and how often."""

    directory: str
    packed: bool
    dtype: str
    prompt: list[int]
    tokens: int
    repeats: int
    threads: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def execute(job: Job, logits: Path) -> dict[str, Any]:
    """Median tokens per second of whole generations, resident bytes above the imports, bytes of the weights.

    The logits of the prompt are written to the file `logits`.
    """
    torch.set_num_threads(job.threads)
    models.check_model(job.directory)  # imports the model's code
    before = machine.resident_parts()
    model = _load(job)
    ids = torch.tensor([job.prompt])

    def generate(tokens: int) -> torch.Tensor:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )

    with models.quiet():
        generate(WARMUP)
        rates = []
        for _ in range(job.repeats):
            start = time.perf_counter()
            made = generate(job.tokens)
            rates.append(job.tokens / (time.perf_counter() - start))
    own, mapped = (now - then for now, then in zip(machine.resident_parts(), before, strict=True))
    with torch.no_grad(), dispatch.served() as served:
        save_file({"logits": model(ids).logits[0].float()}, logits)
    return {
        "tokens_per_second": statistics.median(rates),
        "resident_bytes": own + mapped,
        "own_bytes": own,
        "mapped_bytes": mapped,
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "generated": made[0, len(job.prompt) :].tolist(),
        "kernel": "+".join(
            sorted({f"cpu/{cpu.active_path()}" if backend == "cpu" else backend for _, backend in served})
        ),
        "device": bench_machine.device(),
    }


def _load(job: Job) -> Any:
    if job.packed:
        return packed_model.load_weights(job.directory, job.dtype)
    return AutoModelForCausalLM.from_pretrained(job.directory, dtype=job.dtype).eval()


def main(path: Path) -> None:
    job = Job(**json.loads(path.read_text()))
    write_json(path.with_name("result.json"), execute(job, path.with_name("logits.safetensors")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
