"""`python -m tests.perp.kill`: a run killed (SIGKILL) at random moments and begun again, until it ends by itself.

In memory and streamed: two cycles of pruning, each retrained with the dense model as teacher. Prints what each process
had to make, and fails unless the output is bitwise that of a run left alone and no process made a unit or took a step
again that was written down.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from perp import pace, planning, report, resume, run
from perp.finished import Finished
from perp.settings import RunSettings

from . import families, tiny

KINDS = ("memory", "streamed")


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of each file, but for those that tell how long things took."""
    timed = ("perp.json", "report.json", "report.png")
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in timed
    }


def model_of(directory: Path, blocks: int) -> Path:
    words = tiny.tokenizer()
    model = families.build("llama", vocab_size=len(words), num_hidden_layers=blocks, dtype=torch.bfloat16)
    model.save_pretrained(directory / "model", max_shard_size="30KB")
    words.save_pretrained(directory / "model")
    return directory / "model"


def hurry(put: Callable[[Any, str, Any], None]) -> None:
    """Leave out what takes a short run longest: pictures, and measuring the machine for its plan."""
    rates = [field.name for field in fields(pace.Rates) if field.default is MISSING]
    put(report, "picture", lambda reports, path: path.touch())
    put(planning, "measure", lambda job, shape, device: pace.Rates(**dict.fromkeys(rates, 1e10)))


def job(model: Path, text: Path, out: Path, kind: str) -> int:
    """One run in a process forked from this one, which has everything imported; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        hurry(setattr)
        noted(out.with_name(f"{out.name}.log"))
        settings = RunSettings(
            model=str(model),
            out=out,
            data=str(text),
            pattern="2:4",
            epochs=2,
            steps=4,
            batch=1,
            cycles=2,
            distil=0.5,
            schedule="linear",
            compare=("pruned",),
            windows=4,
            seqlen=32,
            eval_windows=2,
            device="cpu",
            stream=kind == "streamed",
        )
        run.run(settings)
        os._exit(0)
    finally:
        os._exit(1)


def noted(log: Path) -> None:
    """Have this process write a line for every unit, block and step that it has finished, once it is on the disk."""

    def and_note(own: Callable[..., None]) -> Callable[..., None]:
        def write(stage: Finished, what: str | int, *others: Any) -> None:
            own(stage, what, *others)
            with log.open("a") as file:
                file.write(f"{stage.directory.name} {what}\n")

        return write

    for name in ("write_unit", "write_block"):
        setattr(Finished, name, and_note(getattr(Finished, name)))
    resume.SECONDS = 0.0
    write = resume.Checkpoint.write

    def step(self: resume.Checkpoint, optimiser: Any, losses: list[float], ended: bool = False) -> None:
        write(self, optimiser, losses, ended)
        with log.open("a") as file:
            file.write(f"{self.path.parent.name} step {len(losses)}\n")

    resume.Checkpoint.write = step


def written(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--blocks", type=int, default=4)
    options.add_argument("--kind", choices=KINDS, action="append")
    asked = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        model, text = model_of(Path(place), asked.blocks), tiny.text_file(Path(place))
        return max(
            killed(Path(place, kind), model, text, kind, asked.kills, random.Random(asked.seed))
            for kind in asked.kind or KINDS
        )


def killed(directory: Path, model: Path, text: Path, kind: str, kills: int, draw: random.Random) -> int:
    """Kill and begin again so often, each time that the run ends by itself from the start; 0 if all is the same."""
    directory.mkdir()
    out = directory / "out"
    started = time.monotonic()
    assert os.waitpid(job(model, text, directory / "alone", kind), 0)[1] == 0
    alone, done = time.monotonic() - started, 0
    while done < kills:
        child = job(model, text, out, kind)
        # Anywhere in what one process would still have to do, or a little beyond.
        time.sleep(draw.uniform(0, 1.1 * alone))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:  # it had ended by itself
            if compare(directory):
                return 1
            shutil.rmtree(out)
            (directory / "out.log").unlink()
            continue
        done += 1
        print(f"{kind}, kill {done}: {written(directory / 'out.log')} units, blocks and steps written", flush=True)
    if os.waitpid(job(model, text, out, kind), 0)[1]:
        print("the last run failed", file=sys.stderr)
        return 1
    return compare(directory)


def compare(directory: Path) -> int:
    if hashes(directory / "out") != hashes(directory / "alone"):
        print("the output differs from that of a run left alone", file=sys.stderr)
        return 1
    again = [line for line, count in Counter((directory / "out.log").read_text().splitlines()).items() if count > 1]
    if again:
        print(f"made again although finished: {', '.join(again)}", file=sys.stderr)
        return 1
    print("the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
