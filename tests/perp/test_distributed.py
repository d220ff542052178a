"""Two and four ranks against one: the same masks to the bit, the same training to rounding, no rank left waiting."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import perp
from perp import checkpoints, data, distributed, record, run
from perp.cli import app
from perp.distil import Teacher
from perp.errors import UserError
from perp.iterate import prune_retrain
from perp.lock import locked
from perp.optim import AdamW
from perp.prune import Pruned, prune_model
from perp.reconstruct import ReconstructSettings
from perp.refine import RefineSettings
from perp.retrain import RetrainSettings, drawn, retrain
from perp.settings import RunSettings

from . import families, tiny
from .ranks import launch, refusal

# Not to be divided by two ranks or by four.
WINDOWS, TOKENS = 7, 16
# What training in float64 may differ by. Sums in another order differ by some 1e-15, which a few steps of AdamW make
# larger; a gradient or a window left out, or weighted wrongly, changes results by a hundredth and more.
ROUNDING = 1e-9


def tokens(count: int = WINDOWS) -> Tensor:
    return torch.randint(families.VOCABULARY, (count, TOKENS), generator=torch.Generator().manual_seed(7))


def model(family: str = "llama", dtype: torch.dtype = torch.float64) -> Any:
    return families.build(family).to(dtype)


def weights(subject: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in subject.state_dict().items()}


def pruned(family: str, dtype: torch.dtype, *arguments: Any, **options: Any) -> tuple[Pruned, dict[str, Tensor]]:
    subject = model(family, dtype)
    found = prune_model(subject, tokens(), *arguments, **options)
    return found, weights(subject)


def retrained(settings: RetrainSettings, taught: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and merged weights of a model retrained from magnitude's mask, with the dense model's help if `taught`."""
    subject, windows = model(), tokens()
    teacher = None
    if taught:
        numbers = torch.cat([distributed.part(batch) for batch in drawn(len(windows), settings)]).tolist()
        teacher = Teacher(subject, windows, numbers, settings.distil)
    masks = prune_model(subject, None, "magnitude", "0.5").masks
    perp.swap_linears(subject, masks)
    losses = retrain(subject, windows, settings, teacher=teacher)
    perp.merge(subject)
    perp.unswap(subject)
    return losses, weights(subject)


def moments() -> tuple[float, Tensor, list[bool]]:
    """A step of least squares over seven rows, and which parameters have got a gradient."""
    rows = torch.randn(WINDOWS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    used, unused, last = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
    optimiser = AdamW([used, unused, last], lr=0.1, steps=1)

    def loss() -> Tensor:
        own = distributed.part(rows)
        extra = last.sum() if any(row.equal(rows[-1]) for row in own) else 0.0
        return (own @ used).square().sum() / len(rows) + extra

    told = optimiser.step([loss])
    state = optimiser.adam.state
    return told, state[used]["exp_avg"], [parameter in state for parameter in (used, unused, last)]


def cycled() -> dict[str, Tensor]:
    subject, settings = model(), replace(LORA, steps=2)
    prune_retrain(subject, tokens(), tokens(), ["0.25", "0.5"], [settings, settings])
    return weights(subject)


SINGLE, DOUBLE = torch.float32, torch.float64
LORA = RetrainSettings(parts=("mask_lora", "norms"), steps=3, batch=5, r=4, lr=1e-2)
TAUGHT = replace(LORA, distil=0.5)
KEPT = ReconstructSettings(batch=3, epochs=2)
ADAPTERS = ReconstructSettings(parts=("mask_lora", "norms"), loss="nmse", batch=4, epochs=2, r=4)
COSINE = ReconstructSettings(loss="cosine", batch=2, epochs=1, inputs="dense", targets="dense-model")

# What the tests compare, by name. Four ranks do not repeat all that two have shown.
ON_FOUR: dict[str, Callable[[], Any]] = {
    "wanda": lambda: pruned("llama", SINGLE, "wanda", "2:4"),
    "refined": lambda: pruned("llama", SINGLE, "wanda", "0.6", refine=RefineSettings(held_out=0.4), refit=True),
    "experts": lambda: pruned("mixtral", SINGLE, "sparsegpt", "2:4"),
    "kept": lambda: pruned("llama", DOUBLE, "wanda", "2:4", KEPT),
    "retrained": lambda: retrained(LORA),
    "perplexity": lambda: perp.perplexity(model(dtype=SINGLE), tokens()),
    "moments": moments,
}
ON_TWO: dict[str, Callable[[], Any]] = {
    **ON_FOUR,
    "owl": lambda: pruned("llama", SINGLE, "wanda", "0.5", allocate="owl"),
    "sparsegpt": lambda: pruned("llama", SINGLE, "sparsegpt", "0.5"),
    "parallel": lambda: pruned("neox-parallel", DOUBLE, "wanda", "2:4", ADAPTERS),
    "dense inputs": lambda: pruned("llama", DOUBLE, "wanda", "2:4", COSINE),
    "matrix": lambda: pruned("llama", DOUBLE, "wanda", "2:4", KEPT, "matrix"),
    "span": lambda: pruned("llama", DOUBLE, "wanda", "2:4", KEPT, "model"),
    "micro-batches": lambda: retrained(replace(LORA, micro_batch=2)),
    "distilled": lambda: retrained(TAUGHT, taught=True),
    "cycles": cycled,
}
SHARDED: dict[str, Callable[[], Any]] = {
    "sharded": lambda: retrained(replace(LORA, shard=True)),
    "sharded and distilled": lambda: retrained(replace(TAUGHT, shard=True, checkpointing=False), taught=True),
}


def on_a_rank(directory: str) -> dict[str, Any]:
    makers = {**(ON_TWO if distributed.size() == 2 else ON_FOUR), **SHARDED}
    return {name: make() for name, make in makers.items()} | {"refused": refused(Path(directory))}


def refused(directory: Path) -> dict[str, tuple[str, str]]:
    few = distributed.size() - 1
    job = RunSettings(str(directory / "llama"), directory / "locked", device="cpu")
    return {
        "windows": refusal(prune_model, model(), tokens(few)),
        "batch": refusal(retrained, replace(LORA, batch=few)),
        "stream": refusal(run.run, replace(job, stream=True)),
        "unfinished": refusal(run.run, replace(job, out=directory / "begun")),
        "lock": refusal(run.run, job),
        "memory": refusal(run.run, replace(job, out=directory / "free", cpu_memory="1MB")),
        "one rank": refusal(fails_on_the_last),
    }


def fails_on_the_last() -> None:
    with distributed.together():
        if distributed.rank() == distributed.size() - 1:
            raise UserError("the last rank has no room.")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Any]:
    return once(tmp_path_factory, "alone", lambda: {name: make() for name, make in ON_TWO.items()})


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    def make() -> list[dict[str, Any]]:
        directory = tmp_path_factory.mktemp("ranks")
        tiny.model_dir(directory)
        (directory / "begun" / record.RUN).parent.mkdir(parents=True)
        (directory / "begun" / record.RUN).touch()
        with locked(directory / "locked"):
            return launch(directory, request.param, on_a_rank, str(directory))

    return once(tmp_path_factory, f"on-{request.param}", make)


def once(tmp_path_factory, name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, made by one of the processes of pytest-xdist for all of them."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    file = directory / f"{name}.pt"
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            torch.save(make(), file)
    return torch.load(file, weights_only=False)


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


def test_all_ranks_end_with_the_same_model(ranks):
    for name, found in ranks[0].items():
        if name in ("moments", "perplexity", "refused"):
            continue
        for other in ranks[1:]:
            own, others = (value if isinstance(value, dict) else value[1] for value in (found, other[name]))
            assert_same(own, others)
            if isinstance(found, tuple) and isinstance(found[0], Pruned):
                assert_same(dict(found[0].masks), dict(other[name][0].masks))
                assert found[0].losses == other[name][0].losses


def test_the_masks_are_those_of_one_rank(ranks, alone):
    for name in {"wanda", "owl", "sparsegpt", "refined", "experts", "kept", "parallel"} & ranks[0].keys():
        found, expected = ranks[0][name][0], alone[name][0]
        assert_same(dict(found.masks), dict(expected.masks))
        assert found.shares == expected.shares


def test_what_is_only_pruned_is_that_of_one_rank_to_the_bit(ranks, alone):
    for name in {"wanda", "owl"} & ranks[0].keys():
        assert_same(ranks[0][name][1], alone[name][1])
    # Compensated weights differ as their fp32 Grams do.
    for name in {"sparsegpt", "refined", "experts"} & ranks[0].keys():
        torch.testing.assert_close(ranks[0][name][1], alone[name][1], rtol=1e-3, atol=1e-4)


def test_every_rank_tells_what_refining_did_to_all_masks(ranks, alone):
    expected = alone["refined"][0].refined
    for rank in ranks:
        found = rank["refined"][0].refined
        assert found.keys() == expected.keys()
        for name, one in found.items():
            assert one.steps == expected[name].steps
            assert one.before == pytest.approx(expected[name].before, rel=1e-4)
            assert one.after == pytest.approx(expected[name].after, rel=1e-4)


def test_reconstruction_is_that_of_one_rank_to_rounding(ranks, alone):
    for name in {"kept", "parallel", "dense inputs", "matrix", "span"} & ranks[0].keys():
        (found, found_weights), (expected, expected_weights) = ranks[0][name], alone[name]
        assert_close(found_weights, expected_weights)
        assert found.losses.keys() == expected.losses.keys()
        for unit, losses in expected.losses.items():
            assert losses.after < losses.before
            assert found.losses[unit].before == pytest.approx(losses.before, rel=ROUNDING)
            assert found.losses[unit].after == pytest.approx(losses.after, rel=ROUNDING)


def test_retraining_is_that_of_one_rank_to_rounding(ranks, alone):
    like = {"retrained": "retrained", "distilled": "distilled", "sharded": "retrained"}
    like["sharded and distilled"] = "distilled"
    for name in like.keys() & ranks[0].keys():
        (losses, found), (expected_losses, expected) = ranks[0][name], alone[like[name]]
        assert losses == pytest.approx(expected_losses, rel=ROUNDING)
        assert_close(found, expected)


def test_micro_batches_of_other_windows_differ_by_the_rounding_of_fp32_logits(ranks, alone):
    for found in (rank["micro-batches"] for rank in ranks if "micro-batches" in rank):
        assert found[0] == pytest.approx(alone["micro-batches"][0], rel=1e-6)
        torch.testing.assert_close(found[1], alone["micro-batches"][1], rtol=1e-4, atol=1e-4)


def test_cycles_are_those_of_one_rank_to_rounding(ranks, alone):
    for found in (rank["cycles"] for rank in ranks if "cycles" in rank):
        assert_close(found, alone["cycles"])


def test_perplexity_is_that_of_one_rank_to_the_bit(ranks, alone):
    assert {rank["perplexity"] for rank in ranks} == {alone["perplexity"]}


def test_a_step_takes_the_gradient_of_the_mean_over_all_windows(ranks):
    # AdamW does not feel the scale of a gradient; its first moment, a tenth of the first gradient, does.
    rows = torch.randn(WINDOWS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    answers = rows.sum(1)
    for rank in ranks:
        loss, moment, trained = rank["moments"]
        assert loss == pytest.approx(float(answers.square().mean()) + 3, rel=1e-12)
        torch.testing.assert_close(moment, 0.1 * 2 * (answers[:, None] * rows).mean(0), rtol=1e-12, atol=1e-14)
        # A gradient that one rank has is everyone's; one that none has stays none.
        assert trained == [True, False, True]


def test_what_cannot_be_is_refused_with_one_sentence_on_every_rank(ranks):
    count = len(ranks)
    refused = ranks[0]["refused"]
    assert f"{count - 1} calibration windows are too few for {count} ranks" in refused["windows"][1]
    assert f"a batch of {count - 1} windows is too small for {count} ranks" in refused["batch"][1]
    assert "--stream is of a run of one process" in refused["stream"][1]
    assert "begun holds an unfinished run of one process" in refused["unfinished"][1]
    assert "another run (process " in refused["lock"][1]
    assert "does not fit" in refused["memory"][1]
    assert refused["one rank"][1] == "the last rank has no room."
    for name, (_, sentence) in refused.items():
        assert {rank["refused"][name][1] for rank in ranks} == {sentence}
    # The one who has the error tells it.
    assert [rank["refused"]["one rank"][0] for rank in ranks] == ["Echo"] * (count - 1) + ["UserError"]
    assert [rank["refused"]["lock"][0] for rank in ranks] == ["UserError"] + ["Echo"] * (count - 1)


def dies_on_the_last() -> str:
    if distributed.rank() == distributed.size() - 1:
        os._exit(9)
    started = time.monotonic()
    try:
        prune_model(model(), tokens())
    except RuntimeError as error:
        return f"{time.monotonic() - started:.0f} s: {error}"
    return "went on alone"


def test_a_rank_that_dies_ends_the_others(tmp_path):
    first, last = launch(tmp_path, 2, dies_on_the_last, seconds=60)
    assert last == 9
    assert "onnection" in first or "losed" in first


def test_other_commands_are_of_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    monkeypatch.setenv("RANK", "1")
    refused = CliRunner().invoke(app, ["doctor"])
    assert refused.exit_code == 2
    assert "perp doctor is one process; start it without torchrun." in refused.output


def test_sharing_weights_out_takes_several_ranks(tmp_path):
    job = RunSettings(str(tiny.model_dir(tmp_path)), tmp_path / "out", shard=True, device="cpu")
    with pytest.raises(UserError, match="--shard shares weights out among the processes of torchrun; leave it out"):
        run.run(job)


def test_torchrun_leaves_the_directory_of_one_process(tmp_path):
    directory, text = tiny.model_dir(tmp_path), tiny.text_file(tmp_path)
    options = "--pattern 2:4 --granularity none --steps 2 --batch 3 --lr 1e-2 --windows 3 --seqlen 16 --eval-windows 3"
    job = [str(directory), "--data", str(text), *options.split(), "--dtype", "float32", "--device", "cpu"]
    own = ["-m", "perp", "run", *job, "--out", str(tmp_path / "two"), "--shard"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join(sys.path)
    told = subprocess.run(
        [*torchrun, *own], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("saved after") == 1
    assert told.stderr.count("prune  1/2") == 1
    settings = RunSettings(
        str(directory),
        tmp_path / "one",
        "2:4",
        data=str(text),
        reconstruct="none",
        steps=2,
        batch=3,
        retrain_lr=1e-2,
        windows=3,
        seqlen=16,
        eval_windows=3,
        dtype="float32",
        device="cpu",
    )
    run.run(settings)
    one, two = ({str(path.relative_to(out)) for path in out.rglob("*")} for out in (tmp_path / "one", tmp_path / "two"))
    assert one == two
    assert_same(checkpoints.load_masks(tmp_path / "one"), checkpoints.load_masks(tmp_path / "two"))
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    subject, words = perp.load(str(tmp_path / "two"))
    windows = data.windows(words, data.split(data.documents(str(text))).test, 16, 3)
    assert perp.perplexity(subject, windows) > 1
