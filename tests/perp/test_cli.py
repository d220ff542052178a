from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import perp
from perp import machine
from perp.cli import app
from perp.settings import BEST, RunSettings, best

from . import tiny

ROOT = Path(__file__).parents[2]
SMALL = [
    "--seqlen",
    "16",
    "--windows",
    "2",
    "--steps",
    "2",
    "--batch",
    "1",
    "--epochs",
    "1",
    "--eval-windows",
    "2",
    "--lr",
    "1e-3",
]


def call(*arguments: object):
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result, *words: str) -> None:
    """One sentence on standard error, exit code 2, no traceback."""
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert result.stderr.startswith("perp: ")
    assert result.stderr.endswith(".\n")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return tiny.text_file(tmp_path_factory.mktemp("text"))


def test_help_of_everything_has_an_example_and_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from perp.cli import app\n"
        "for words in ([], ['run'], ['eval'], ['generate'], ['pack'], ['demo'], ['doctor']):\n"
        "    result = CliRunner().invoke(app, [*words, '--help']); assert result.exit_code == 0, words\n"
        "    assert not words or f'perp {words[0]}' in result.output.split('Example:')[1], words\n"
        "assert not {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_a_plan_takes_what_a_run_takes():
    run, plan = ({p.name: p for p in get_command(app).commands[name].params} for name in ("run", "plan"))
    assert set(run) - set(plan) == {"quiet"}
    assert {name for name in plan if run[name].default != plan[name].default} == {"out"}
    assert not plan["out"].required
    assert run["out"].required


def test_version():
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"perp {perp.__version__}\n")


def test_run_saves_a_pruned_model_and_tells_of_every_state(model, text, tmp_path):
    out = tmp_path / "out"
    result = call(
        "run", model, "--pattern", "2:4", "--data", text, "--out", out, "--compare", "pruned,dense-retrained", *SMALL
    )
    assert result.exit_code == 0, result.output
    for state in (
        "dense",
        "dense retrained",
        "wanda 2:4 pruned",
        "wanda 2:4 reconstructed",
        "wanda 2:4 retrained",
    ):
        assert f" {state} " in result.stdout
    manifest = json.loads((out / "perp.json").read_text())
    assert manifest["pattern"] == "2:4"
    assert manifest["data"]["train"]["name"] == str(text)
    assert len(manifest["perplexity"]) == 5
    rows = json.loads((out / "perp" / "report.json").read_text())[0]["rows"]
    assert [row["zeros"] for row in rows[2:]] == pytest.approx([0.5, 0.5, 0.5], abs=1e-3)
    assert not list(out.rglob("*staging*"))


def test_a_refined_and_refitted_run_tells_of_every_linear(model, text, tmp_path):
    out, options = tmp_path / "out", ["--refine", "sparseswaps", "--refine-steps", "7", "--refit", "--retrain", "none"]
    small = [*SMALL, "--windows", "4"]
    result = call("run", model, "--pattern", "0.6", "--allocate", "owl", "--data", text, "--out", out, *options, *small)
    assert result.exit_code == 0, result.output
    assert "wanda 0.6 owl + sparseswaps + refit" in result.stdout
    manifest = json.loads((out / "perp.json").read_text())
    assert manifest["settings"]["refine"] == "sparseswaps"
    assert manifest["settings"]["refit"] is True
    assert manifest["settings"]["allocate"] == "owl"
    assert set(manifest["refined"]) == set(manifest["sparsity"])
    for figures in manifest["refined"].values():
        assert figures["after"] <= figures["before"]
        assert 0 <= figures["steps"] <= 7
    pruned = sum(counts["pruned"] for counts in manifest["sparsity"].values())
    assert pruned / sum(counts["total"] for counts in manifest["sparsity"].values()) == pytest.approx(0.6, abs=0.04)


@pytest.mark.parametrize("bf16, precision", [(True, "bf16"), (False, "model")])
def test_the_best_gives_way_to_what_is_said_and_to_the_machine(model, text, tmp_path, monkeypatch, bf16, precision):
    monkeypatch.setattr(machine, "multiplies_bf16", lambda device: bf16)
    out = tmp_path / "out"
    job = [model, "--best", "--pattern", "2:4", "--method", "wanda", "--data", text, "--out", out, *SMALL]
    result = call("run", *job)
    assert result.exit_code == 0, result.output
    settings = json.loads((out / "perp.json").read_text())["settings"]
    assert (settings["method"], settings["windows"]) == ("wanda", 2)
    assert (settings["distil"], settings["precision"]) == (0.5, precision)


def test_a_precision_that_is_asked_for_is_kept_where_it_is_slow(monkeypatch):
    monkeypatch.setattr(machine, "multiplies_bf16", lambda device: False)
    job = RunSettings("demo", Path("out"), precision="bf16")
    assert best(job, {"precision"}).precision == "bf16"
    assert best(job, {"windows"}).windows is None
    assert best(job).windows == BEST["windows"]


@pytest.mark.parametrize("recovery", [["--retrain", "none"], ["--retrain", "lora", "--keep-adapters", "--lr", "0.1"]])
def test_eval_agrees_with_the_run_that_saved_the_model(model, text, tmp_path, recovery):
    out = tmp_path / "out"
    assert call("run", model, "--data", text, "--out", out, *recovery, "-q", *SMALL).exit_code == 0
    rows = json.loads((out / "perp" / "report.json").read_text())[0]["rows"]
    result = call("eval", out, "--data", text, "--seqlen", 16, "--windows", 2)
    assert result.exit_code == 0, result.output
    assert f"{rows[-1]['perplexity']['articles']:.1f}" in result.stdout


def test_a_run_repeats_bitwise(model, text, tmp_path):
    for name in ("a", "b"):
        assert call("run", model, "--data", text, "--out", tmp_path / name, "-q", *SMALL).exit_code == 0
    a, b = (tmp_path / name / "model.safetensors" for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("pattern", ["3:2", "1.5", "0", "1", "2:4:8", "abc", "", "0:4", "4:4", "-1", "nan", "2:4/row"])
def test_bad_patterns(pattern, model, text, tmp_path):
    refused(call("run", model, f"--pattern={pattern}", "--data", text, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_does_not_divide_a_layer(model, text, tmp_path):
    result = call("run", model, "--pattern", "3:5", "--data", text, "--out", tmp_path / "out", *SMALL)
    refused(result, "layers.0.self_attn.q_proj", "32", "3:5")
    assert not (tmp_path / "out").exists()


def bad_models(tmp_path: Path, model: Path) -> dict[str, tuple[object, str]]:
    """name -> (what is given as MODEL, a word the sentence must hold)."""
    import shutil

    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    from .tiny import tokenizer

    def copy(name: str) -> Path:
        return Path(shutil.copytree(model, tmp_path / name))

    no_weights, pickled, damaged = copy("no-weights"), copy("pickled"), copy("damaged")
    (no_weights / "model.safetensors").unlink()
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[: len(content) // 2])
    small = {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    BertModel(BertConfig(**small)).save_pretrained(tmp_path / "encoder")
    T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ).save_pretrained(tmp_path / "both")
    for name in ("encoder", "both"):
        tokenizer().save_pretrained(tmp_path / name)
    broken = tiny.model_dir(tmp_path / "nan")
    from safetensors.torch import load_file, save_file

    state = load_file(broken / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    return {
        "no such path": (tmp_path / "nowhere", "no directory"),
        "hub id without network": ("nobody/nothing-of-that-name", "neither a directory"),
        "no weights": (no_weights, "no weights"),
        "pickled": (pickled, "pickled"),
        "truncated": (damaged, "truncated or damaged"),
        "encoder": (tmp_path / "encoder", "decoder-only"),
        "encoder and decoder": (tmp_path / "both", "decoder-only"),
        "NaN weights": (broken, "NaN"),
    }


def test_bad_models(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in (["run", "--out", tmp_path / "out"], ["eval"]):
        for given, word in bad_models(tmp_path / command[0], model).values():
            refused(call(command[0], given, *command[1:], "--data", text, "--seqlen", 16), word)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("order", ["run", "plan"])
def test_a_model_without_linears(order, text, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = tmp_path / "model"
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    refused(call(order, model, "--data", text, "--out", tmp_path / "out", *SMALL), "hold no nn.Linear to prune")


def test_bad_text(model, tmp_path):
    cases = {
        "missing.txt": (None, "there is no text at"),
        "empty.txt": (b"", "is empty"),
        "binary.txt": (b"\x00\x01", "binary data"),
        "latin.txt": (b"caf\xe9 au lait", "not UTF-8"),
        "short.txt": (b"hello", "too little text for one window"),
        "lines.jsonl": (b'{"text": "a"}\nnot json\n', "line 2"),
        "table.csv": (b"text\n", "none of the kinds"),
    }
    for name, (content, word) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        refused(call("run", model, "--data", tmp_path / name, "--out", tmp_path / "out"), word)
        refused(call("eval", model, "--data", tmp_path / name, "--part", "all"), word)
    assert not (tmp_path / "out").exists()


def test_text_that_is_trained_on_is_not_judged_on(model, text, tmp_path):
    refused(call("run", model, "--data", text, "--eval-data", text, "--out", tmp_path / "out"), "test part")


def test_an_output_directory_that_is_not_empty(model, text, tmp_path):
    (tmp_path / "precious").write_text("mine")
    refused(call("run", model, "--data", text, "--out", tmp_path), "not empty", "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert call("run", model, "--data", text, "--out", tmp_path, "--overwrite", "-q", *SMALL).exit_code == 0
    assert (tmp_path / "precious").read_text() == "mine"


def test_an_output_directory_that_cannot_be(model, text, tmp_path):
    (tmp_path / "file").touch()
    refused(call("run", model, "--data", text, "--out", tmp_path / "file" / "out"), "is a file")


@pytest.mark.parametrize(
    "options, word",
    [
        (["--method", "guess"], "magnitude, wanda, ria, sparsegpt"),
        (["--refine", "swaps"], "sparseswaps"),
        (["--refine", "sparseswaps", "--windows", "1"], "use more windows"),
        (["--refine", "sparseswaps", "--method", "sparsegpt", "--pattern", "2:4"], "refit"),
        (["--refine-steps", "0"], "at least 1"),
        (["--allocate", "owl", "--pattern", "2:4"], "write a share"),
        (["--allocate", "guess"], "uniform or owl"),
        (["--method", "sparsegpt", "--pattern", "0.5/matrix"], "0.5/slab or 0.5/row"),
        (["--reconstruct", "quarter"], "half-block"),
        (["--retrain", "everything"], "mask_lora"),
        (["--reconstruct-parts", "heads"], "norms"),
        (["--granularity", "layer"], "4-blocks"),
        (["--granularity", "none", "--loss", "cosine"], "--loss is of reconstruction"),
        (["--targets", "dense"], "dense-model"),
        (["--retrain", "lora"], "--keep-adapters"),
        (["--retrain", "kept,spp"], "same weights"),
        (["--cycles", "2", "--retrain", "none"], "parts to retrain"),
        (["--precision", "fp8"], "bf16"),
        (["--compare", "nothing"], "dense-retrained"),
        (["--dtype", "int8"], "bfloat16"),
        (["--windows", "0"], "at least 1"),
        (["--seqlen", "1"], "at least 2"),
        (["--steps", "-3"], "at least 1"),
        (["--lr", "-1"], "learning rate"),
        (["--rank", "0"], "at least 1"),
        (["--device", "quantum"], "device"),
        (["--seqlen", "100000"], "at most 64 tokens"),
    ],
)
def test_bad_settings(options, word, model, text, tmp_path):
    refused(call("run", model, "--data", text, "--out", tmp_path / "out", *SMALL, *options), word)
    assert not (tmp_path / "out").exists()


def test_tasks_without_lm_eval_name_the_extra(model, monkeypatch):
    import perp.evaluate

    find_spec = perp.evaluate.importlib.util.find_spec
    monkeypatch.setattr(
        perp.evaluate.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name)
    )
    refused(call("eval", model, "--tasks", "hellaswag"), "pip install 'perp[tasks]'")


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("perp.doctor.examine", lambda: int("x"))
    assert isinstance(call("doctor").exception, ValueError)


def test_out_of_memory_is_a_sentence(monkeypatch):
    def fail():
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr("perp.doctor.examine", fail)
    refused(call("doctor"), "out of memory", "--windows")


def test_doctor():
    result = call("doctor")
    assert result.exit_code == 0
    assert "Kernels" in result.stdout


def environment() -> dict[str, str]:
    path = os.pathsep.join(str(directory) for directory in (ROOT, ROOT / "python"))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(*arguments: object) -> subprocess.Popen[str]:
    """A run in a process of its own that Ctrl-C can interrupt, even where this one was started with SIGINT ignored."""
    return subprocess.Popen(
        [sys.executable, "-m", "perp", *(str(argument) for argument in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize("order", ["plan", "run"])
def test_a_mixture_is_planned_without_a_word_of_torch(order, text, tmp_path):
    process = start(order, tiny.model_dir(tmp_path, "qwen2-moe"), "--data", text, "--out", tmp_path / "out", *SMALL)
    told, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "Traceback" not in told + errors


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_at_once_and_leaves_no_model(number, code, model, text, tmp_path):
    out = tmp_path / "out"
    process = start("run", model, "--data", text, "--out", out, *SMALL, "--steps", 100_000)
    for line in process.stderr:
        if line.startswith("retrain"):
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("perp: interrupted")
    assert [path.name for path in out.iterdir()] == ["perp"]
    assert {path.name for path in (out / "perp").iterdir()} == {"run.json", "stage-reconstructed", "stage-retrained"}
    refused(call("run", model, "--data", text, "--out", out, *SMALL), "steps 100000, not", "pass --overwrite")


def test_the_saved_model_needs_no_perp(model, text, tmp_path):
    out = tmp_path / "out"
    process = start("run", model, "--data", text, "--out", out, *SMALL)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    row = json.loads((out / "perp" / "report.json").read_text())[0]["rows"][-1]
    code = (
        "import json, math, sys, torch; sys.modules['perp'] = sys.modules['perp_kernels'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "words = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "texts = [json.loads(line)['text'] for line in open(sys.argv[2])][::20]\n"
        "ids = words('\\n\\n'.join(texts), add_special_tokens=False)['input_ids'][:32]\n"
        "windows = torch.tensor(ids).view(2, 16)\n"
        "print(math.exp(sum(model(input_ids=w[None], labels=w[None]).loss.item() for w in windows) / 2))\n"
    )
    plain = {**environment(), "PYTHONPATH": ""}
    told = subprocess.run(
        [sys.executable, "-c", code, out, text], check=True, capture_output=True, text=True, env=plain
    )
    assert float(told.stdout) == pytest.approx(row["perplexity"]["articles"], rel=1e-5)
