import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perp import checkpoints, models, packed_model, report, run
from perp.activations import Place
from perp.distil import Teacher
from perp.errors import UserError
from perp.lock import LOCK, locked
from perp.progress import Silent
from perp.retrain import RetrainSettings
from perp.settings import RunSettings
from perp.stream import Stream
from perp.streamed_run import StreamedJob, make_teacher

from . import families, tiny
from .kill import hurry


@pytest.fixture(scope="module", autouse=True)
def _hurry():
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch.setattr)
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> RunSettings:
    directory = tmp_path_factory.mktemp("job")
    words = tiny.tokenizer()
    path = directory / "model"
    model = families.build("llama", vocab_size=len(words), num_hidden_layers=2, dtype=torch.bfloat16)
    model.save_pretrained(path, max_shard_size="20KB")
    words.save_pretrained(path)
    return RunSettings(
        model=str(path),
        out=directory / "out",
        data=str(tiny.text_file(directory)),
        pattern="2:4",
        epochs=1,
        retrain=(),
        windows=3,
        seqlen=16,
        eval_windows=2,
        device="cpu",
        stream=True,
    )


@pytest.fixture(scope="module")
def finished(settings) -> Path:
    """The output of an uninterrupted run."""
    run.run(settings)
    return settings.out


def test_a_streamed_run_leaves_what_one_in_memory_leaves(settings, finished, tmp_path):
    out = tmp_path / "out"
    found = run.run(replace(settings, out=out, stream=False))
    ours, _ = models.load(str(finished))
    whole, _ = models.load(str(out))
    for name, weight in whole.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    assert (finished / checkpoints.MASKS).read_bytes() == (out / checkpoints.MASKS).read_bytes()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (finished / name).read_bytes() == (out / name).read_bytes()
    told, expected = (json.loads((place / "perp.json").read_text()) for place in (finished, out))
    for part in ("perplexity", "sparsity", "data", "seeds", "method", "pattern"):
        assert told[part] == expected[part], part
    rows = json.loads((finished / "perp" / report.ROWS).read_text())[0]["rows"]
    assert [(row["stage"], row["zeros"], row["trained"]) for row in rows] == [
        (row.stage, row.zeros, row.trained) for row in found.rows
    ]


def test_nothing_but_the_model_is_left(settings, finished):
    assert {path.name for path in (finished / "perp").iterdir()} <= {"masks.safetensors", report.ROWS, report.PICTURE}
    index = json.loads((finished / models.INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == sorted(path.name for path in finished.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for path in finished.glob("*.safetensors") for tensor in load_file(path).values()
    )
    assert len({path.stat().st_mode for path in finished.rglob("*") if path.is_file()}) == 1


def test_the_packed_file_is_that_of_a_run_in_memory(settings, tmp_path):
    plain = replace(settings, reconstruct="none", packed=True)
    for stream in (True, False):
        run.run(replace(plain, out=tmp_path / str(stream), stream=stream))
    one, other = ((tmp_path / str(stream) / checkpoints.PACKED).read_bytes() for stream in (True, False))
    assert one == other
    packed_model.load_packed(tmp_path / "True")


@pytest.mark.parametrize(
    "family, tied, retrain",
    [
        ("llama", False, ("mask_lora", "norms")),
        ("llama", True, ("mask_lora", "norms", "head")),
        ("opt", False, ("spp", "biases", "head")),
        ("mixtral", False, ("mask_lora", "norms")),
        ("gpt-oss", False, ("mask_lora", "head")),
    ],
)
def test_retraining_streams_over_the_packed_weights(family, tied, retrain, settings, tmp_path):
    """The same training as in memory, to rounding: there the weights are dense, here packed."""
    model = tiny.model_dir(tmp_path, family, dtype=torch.bfloat16, tie_word_embeddings=tied)
    job = replace(settings, model=str(model), retrain=retrain, steps=3, batch=2, compare=(), reconstruct="none")
    rows = [run.run(replace(job, out=tmp_path / str(stream), stream=stream)).rows for stream in (True, False)]
    assert [row.stage for row in rows[0]] == [report.DENSE, report.PRUNED, report.RETRAINED]
    assert rows[0][-1].parameters == rows[1][-1].parameters
    assert rows[0][-1].zeros == rows[1][-1].zeros == 0.5
    (ours, _), (whole, _) = (models.load(str(tmp_path / str(stream))) for stream in (True, False))
    before, _ = models.load(str(model))
    for name, weight in whole.state_dict().items():
        moved = (weight - before.state_dict()[name]).float().norm()
        assert (ours.state_dict()[name] - weight).float().norm() <= 0.05 * moved, name
    assert torch.equal(ours.get_input_embeddings().weight, before.get_input_embeddings().weight)
    trained = whole.lm_head if "head" in retrain else whole.model.norm
    assert not torch.equal(
        trained.weight, before.get_submodule("lm_head" if "head" in retrain else "model.norm").weight
    )


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "mixtral"])
@pytest.mark.parametrize("place", ["device", "memory", "disk"])
def test_the_teacher_of_a_streamed_run_is_that_of_the_dense_model(family, place, tmp_path):
    path = tiny.model_dir(tmp_path, family)
    windows = torch.randint(3, 60, (5, 12), generator=torch.Generator().manual_seed(0))
    dense, _ = models.load(str(path))
    numbers = [4, 1, 1, 2]
    expected = Teacher(dense, windows, numbers)
    places = []

    def put(count: int) -> Place:
        places.append(count)
        return Place(place, count, tmp_path)

    settings = RetrainSettings(distil=0.3, temperature=2.0)
    found = make_teacher(Stream(str(path)), windows, numbers, settings, put, Silent())
    assert (found.weight, found.temperature, places) == (0.3, 2.0, [3])
    assert torch.equal(found.states([1, 2, 4]), expected.states([1, 2, 4]))
    with pytest.raises(UserError, match=r"has not seen window \[3\]"):
        found.states([1, 3])


RECOVERIES = {
    "distilled": {"distil": 0.5, "steps": 3},
    "distilled, on disk, in bf16": {"distil": 0.5, "steps": 3, "precision": "bf16", "activations": "disk"},
    "in cycles": {"cycles": 3, "pattern": "0.6", "retrain": ("mask_lora", "norms", "head"), "steps": 5},
    "in cycles, distilled": {"cycles": 2, "distil": 0.5, "steps": 4, "schedule": "linear", "reconstruct": "half-block"},
}


@pytest.mark.parametrize("changes", RECOVERIES.values(), ids=RECOVERIES)
def test_what_cycles_and_a_teacher_give_is_what_they_give_in_memory(changes, settings, tmp_path, monkeypatch):
    """To rounding: in memory the weights that are retrained are dense, here packed."""
    changes = dict(changes)
    narrow = changes.get("precision") == "bf16"
    model = tiny.model_dir(tmp_path, "llama")
    activations = changes.pop("activations", "memory")
    monkeypatch.setattr(StreamedJob, "place", lambda self, count: Place(activations, count, self.job.out / "perp"))
    plain = {"model": str(model), "retrain": ("mask_lora", "norms"), "reconstruct": "none", "compare": ()}
    job = replace(settings, **{**plain, "batch": 2, **changes})
    jobs = {
        "streamed": job,
        "in memory": replace(job, stream=False),
        "without": replace(job, stream=False, cycles=1, distil=0.0),
    }
    found = {name: run.run(replace(one, out=tmp_path / name)).rows[-1] for name, one in jobs.items()}
    assert found["streamed"].parameters == found["in memory"].parameters
    assert found["streamed"].zeros == found["in memory"].zeros
    ours, whole, other = (models.load(str(tmp_path / name))[0].state_dict() for name in jobs)
    for name, weight in whole.items():
        moved = (weight - other[name]).float().norm()
        assert (ours[name] - weight).float().norm() <= (0.3 if narrow else 0.02) * moved, name
    assert any(not torch.equal(other[name], weight) for name, weight in whole.items())
    assert {path.name for path in (tmp_path / "streamed" / "perp").iterdir()} <= {
        *("masks.safetensors", report.ROWS, report.PICTURE)
    }


LIFTED = {
    "matrices": {"reconstruct": "matrix"},
    "matrices to the dense model": {"reconstruct": "matrix", "targets": "dense-model", "family": "phi"},
    "two blocks": {"reconstruct": "2-blocks"},
    "three blocks on disk": {"reconstruct": "3-blocks", "targets": "dense-model", "activations": "disk"},
    "the whole model": {"reconstruct": "model", "inputs": "dense"},
    "owl": {"pattern": "0.6", "allocate": "owl", "refine": "sparseswaps", "refit": True},
    "experts": {"family": "mixtral", "packed": True},
    "experts' matrices on disk": {"family": "mixtral", "reconstruct": "matrix", "activations": "disk"},
    "experts beside a shared one": {"family": "qwen2-moe", "method": "sparsegpt", "reconstruct": "none"},
    "experts held transposed, with owl": {"family": "gpt-oss", "pattern": "0.6", "allocate": "owl"},
    "experts behind a dense block": {"family": "deepseek", "reconstruct": "2-blocks"},
}


@pytest.mark.parametrize("changes", LIFTED.values(), ids=LIFTED)
def test_what_streams_gives_the_bits_of_a_run_in_memory(changes, settings, tmp_path, monkeypatch):
    changes = dict(changes)
    family = changes.pop("family", "llama")
    blocks = {} if family in families.MIXTURES else {"num_hidden_layers": 4}
    model = tiny.model_dir(tmp_path, family, **blocks)
    activations = changes.pop("activations", "memory")
    monkeypatch.setattr(StreamedJob, "place", lambda self, count: Place(activations, count, self.job.out / "perp"))
    job = replace(settings, model=str(model), compare=(), **changes)
    rows = [run.run(replace(job, out=tmp_path / str(stream), stream=stream)).rows for stream in (True, False)]
    assert [(row.stage, row.perplexity, row.zeros, row.parameters) for row in rows[0]] == [
        (row.stage, row.perplexity, row.zeros, row.parameters) for row in rows[1]
    ]
    (ours, _), (whole, _) = (models.load(str(tmp_path / str(stream))) for stream in (True, False))
    for name, weight in whole.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    for file in (checkpoints.MASKS, checkpoints.PACKED):
        one, other = (tmp_path / str(stream) / file for stream in (True, False))
        assert one.exists() == other.exists()
        assert not one.exists() or one.read_bytes() == other.read_bytes()
    one, other = (json.loads((tmp_path / str(stream) / "perp.json").read_text()) for stream in (True, False))
    assert one.get("refined") == other.get("refined")


@pytest.mark.parametrize(
    "refused, message",
    [
        ({"compare": ("dense-retrained",), "retrain": ("norms",)}, "cannot retrain the dense model"),
        ({"retrain": ("lora_prune",)}, "cannot retrain adapters that lose something when merged"),
        ({"retrain": ("kept",)}, "cannot retrain all weights; retrain mask_lora, norms, biases or head"),
    ],
)
def test_what_cannot_be_streamed_is_refused_before_work(refused, message, settings, tmp_path):
    with pytest.raises(UserError, match=rf"a streamed run {message}.* or pass --no-stream"):
        run.run(replace(settings, out=tmp_path / "out", **refused))
    assert not (tmp_path / "out").exists()


def test_one_run_at_a_time_in_a_directory(settings, tmp_path):
    with locked(tmp_path / "out"):
        for stream in (True, False):
            with pytest.raises(UserError, match=rf"another run \(process {os.getpid()}\) is writing to"):
                run.run(replace(settings, out=tmp_path / "out", stream=stream))
        assert (tmp_path / "out" / LOCK).exists()
    assert not (tmp_path / "out").exists()


def test_a_budget_too_small_for_one_unit_is_told_before_any_work(settings, tmp_path):
    with pytest.raises(UserError, match=r"does not fit on this machine so; use a machine with .* GB of memory"):
        run.run(replace(settings, out=tmp_path / "out", cpu_memory="1kb"))
    assert not (tmp_path / "out").exists()
