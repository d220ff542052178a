"""perp generate and perp pack, from the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perp import models, packed

from . import tiny
from .test_checkpoints import save
from .test_cli import SMALL, call, environment, refused

PROMPT = "seven hills and"
LINE = re.compile(
    r"^[\d.]+ tokens/s after \d+ ms for the prompt of \d+; resident above imports and tokenizer -?\d+\.\d{3} GB "
    r"\(RssAnon -?\d+\.\d{3}, RssFile -?\d+\.\d{3}\); weights \d+\.\d{3} GB, (packed|dense)$"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "out"
    save(out, packed=True)
    return out


def text_and_line(result) -> tuple[str, str]:
    assert result.exit_code == 0, result.output + repr(result.exception)
    text, _, line = result.stdout.rstrip("\n").rpartition("\n")
    assert LINE.match(line), line
    return text, line


def test_prints_what_the_model_generates(saved):
    model, tokenizer = models.load(str(saved))
    asked = tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(asked["input_ids"], max_new_tokens=9, do_sample=False)[0]
    expected = tokenizer.decode(made, skip_special_tokens=True)
    for options, kind in (([], "packed"), (["--dense"], "dense")):
        text, line = text_and_line(call("generate", saved, "--prompt", PROMPT, "--tokens", 9, *options))
        assert text == expected
        assert line.endswith(kind)
        assert f"prompt of {asked['input_ids'].shape[1]};" in line


def test_sampling_repeats_with_its_seed(saved):
    def sampled(seed: int) -> str:
        options = ["--tokens", 20, "--temperature", 2, "--seed", seed]
        return text_and_line(call("generate", saved, "--prompt", PROMPT, *options))[0]

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(3)}) > 1


def test_another_dtype_and_threads(saved):
    before = torch.get_num_threads()
    try:
        for dtype in ("bfloat16", "float16"):
            text_and_line(call("generate", saved, "-p", PROMPT, "--tokens", 2, "--dtype", dtype, "--threads", 1))
    finally:
        torch.set_num_threads(before)


def test_one_token(saved):
    result = call("generate", saved, "-p", PROMPT, "--tokens", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("1 token after ")


@pytest.mark.parametrize(
    "options, word",
    [
        (["--prompt", ""], "prompt is empty"),
        (["--tokens", "0"], "at least 1"),
        (["--tokens", "62"], "at most 64 tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--dtype", "int8"], "bfloat16"),
        (["--threads", "0"], "at least 1"),
    ],
)
def test_bad_options(options, word, saved):
    given = options if "--prompt" in options else ["--prompt", PROMPT, *options]
    refused(call("generate", saved, *given), word)


def test_bad_directories(saved, tmp_path):
    plain = tiny.model_dir(tmp_path)
    refused(call("generate", tmp_path / "nowhere", "-p", PROMPT), "no directory")
    refused(call("generate", plain, "-p", PROMPT), f"perp pack {plain}", "--packed")
    refused(call("pack", plain), "masks.safetensors")
    refused(call("pack", tmp_path / "nowhere"), "no directory")
    refused(call("pack", plain, "--mask", "guess"), "from-zeros")
    damaged = tmp_path / "damaged"
    save(damaged, packed=True)
    content = bytearray((damaged / packed.PACKED).read_bytes())
    content[-100] ^= 4
    (damaged / packed.PACKED).write_bytes(content)
    refused(call("generate", damaged, "-p", PROMPT), "is damaged", "checksum", "perp pack")


def test_pack_mends_a_damaged_file(tmp_path):
    save(tmp_path / "out", packed=True)
    path = tmp_path / "out" / packed.PACKED
    good = path.read_bytes()
    path.write_bytes(good[:-9])
    result = call("pack", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (0, f"{path}: {len(good) / 1e9:.3f} GB\n")
    assert path.read_bytes() == good


@pytest.mark.parametrize("pattern, layout", [("0.5", "bitmap"), ("2:4", "semi24")])
def test_run_packed_then_generate(pattern, layout, tmp_path):
    out = tmp_path / "out"
    model, text = tiny.model_dir(tmp_path), tiny.text_file(tmp_path)
    result = call("run", model, "--pattern", pattern, "--data", text, "--out", out, "--packed", "-q", *SMALL)
    assert result.exit_code == 0, result.output
    assert {weight.layout for weight in packed.read(out / packed.PACKED).values()} == {layout}
    text_and_line(call("generate", out, "-p", PROMPT, "--tokens", 3))


def test_words_come_as_they_are_made_and_nothing_else_is_printed(saved):
    done = subprocess.run(
        [sys.executable, "-m", "perp", "generate", str(saved), "--prompt", PROMPT, "--tokens", "5"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert LINE.match(done.stdout.splitlines()[-1])
