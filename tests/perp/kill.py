"""`python -m tests.perp.kill`: a streamed run killed (SIGKILL) at random moments, until it ends by itself.

Prints what each process had to make, and fails unless the output is bitwise that of a run left alone and no process
made a unit again that was finished.
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
from pathlib import Path
from typing import Any

import torch

from perp import run, streamed_run  # noqa: F401  all of it once, for the processes to come
from perp.finished import Finished
from perp.settings import RunSettings

from . import families, tiny


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


def job(model: Path, text: Path, out: Path) -> int:
    """One run in a process forked from this one, which has everything imported; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        noted(out.with_name(f"{out.name}.log"))
        settings = RunSettings(
            model=str(model),
            out=out,
            data=str(text),
            pattern="2:4",
            epochs=2,
            retrain=(),
            compare=("pruned",),
            windows=4,
            seqlen=32,
            eval_windows=2,
            device="cpu",
            stream=True,
        )
        run.run(settings)
        os._exit(0)
    finally:
        os._exit(1)


def noted(log: Path) -> None:
    """Have this process write a line for every unit and block that it has finished, once it is on the disk."""

    def and_note(own: Callable[..., None]) -> Callable[..., None]:
        def write(stage: Finished, what: str | int, *others: Any) -> None:
            own(stage, what, *others)
            with log.open("a") as file:
                file.write(f"{stage.directory.name} {what}\n")

        return write

    for name in ("write_unit", "write_block"):
        setattr(Finished, name, and_note(getattr(Finished, name)))


def finished_units(out: Path) -> int:
    """Blocks and units that are written, in all stages."""
    return len([*out.glob("perp/stage-*/block-*.json")]) + len([*out.glob("perp/stage-*/unit-*.safetensors")])


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--blocks", type=int, default=4)
    asked = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        model, text = model_of(directory, asked.blocks), tiny.text_file(directory)
        started = time.monotonic()
        assert os.waitpid(job(model, text, directory / "alone"), 0)[1] == 0
        alone = time.monotonic() - started
        draw = random.Random(asked.seed)
        kills = 0
        while kills < asked.kills:
            child = job(model, text, directory / "out")
            # Anywhere in what one process would still have to do, or a little beyond.
            time.sleep(draw.uniform(0, 1.1 * alone))
            os.kill(child, signal.SIGKILL)
            if os.waitpid(child, 0)[1] == 0:  # it had ended by itself
                if compare(directory):
                    return 1
                shutil.rmtree(directory / "out")
                (directory / "out.log").unlink()
                continue
            kills += 1
            print(f"kill {kills}: {finished_units(directory / 'out')} units and blocks written", flush=True)
        status = os.waitpid(job(model, text, directory / "out"), 0)[1]
        if status:
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
