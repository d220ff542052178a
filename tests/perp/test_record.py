"""A run that did not end is gone on with, in memory and streamed: from what is finished, to the same bits."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perp import record, report, resume, run
from perp.errors import UserError
from perp.finished import Finished
from perp.job import Job
from perp.optim import AdamW
from perp.settings import RunSettings
from perp_kernels import Pattern

from . import families, tiny
from .kill import hashes, hurry

KINDS = pytest.mark.parametrize("stream", [False, True], ids=["memory", "streamed"])


@pytest.fixture(scope="module", autouse=True)
def _hurry():
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch.setattr)
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> RunSettings:
    directory = tmp_path_factory.mktemp("job")
    words = tiny.tokenizer()
    model = families.build("llama", vocab_size=len(words), num_hidden_layers=2, dtype=torch.bfloat16)
    model.save_pretrained(directory / "model", max_shard_size="20KB")
    words.save_pretrained(directory / "model")
    return RunSettings(
        model=str(directory / "model"),
        out=directory / "out",
        data=str(tiny.text_file(directory)),
        pattern="2:4",
        epochs=1,
        retrain=(),
        compare=(),
        windows=3,
        seqlen=16,
        eval_windows=2,
        device="cpu",
    )


@pytest.fixture(scope="module")
def finished(settings) -> Callable[[bool], Path]:
    """The output of an uninterrupted run."""

    def of(stream: bool) -> Path:
        job = replace(settings, out=settings.out / str(stream), stream=stream)
        if not job.out.exists():
            run.run(job)
        return job.out

    return of


def ended_after(owner, names, count, monkeypatch, job) -> None:
    """The process ends, as it were, after so many calls of these methods."""
    left = [count]

    def counted(method):
        def then_stop(*arguments, **named):
            method(*arguments, **named)
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        return then_stop

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            run.run(job)


def run_until(job: RunSettings, monkeypatch, units: int) -> None:
    ended_after(Finished, ("write_unit", "write_block"), units, monkeypatch, job)


def made_by(job: RunSettings, monkeypatch) -> int:
    """The blocks and units that a run of the job makes."""
    made = []
    manifest = Job.manifest
    with monkeypatch.context() as patch:
        patch.setattr(Job, "manifest", lambda self, *others: made.append(self.made) or manifest(self, *others))
        run.run(job)
    return made[0]


@KINDS
@pytest.mark.parametrize("units", [1, 4])
def test_a_second_run_makes_only_what_is_left(settings, finished, tmp_path, monkeypatch, units, stream):
    job = replace(settings, out=tmp_path / "out", stream=stream)
    run_until(job, monkeypatch, units)
    assert made_by(job, monkeypatch) == 4 - units
    assert hashes(tmp_path / "out") == hashes(finished(stream))


@KINDS
def test_matrices_and_several_blocks_are_gone_on_with_too(settings, tmp_path, monkeypatch, stream):
    for reconstruct, units, left in (("matrix", 9, 5), ("2-blocks", 1, 1)):
        place = tmp_path / reconstruct
        job = replace(settings, reconstruct=reconstruct, out=place / "out", stream=stream)
        run.run(replace(job, out=place / "alone"))
        run_until(job, monkeypatch, units)
        assert made_by(job, monkeypatch) == left
        assert hashes(place / "out") == hashes(place / "alone")


@KINDS
def test_what_refining_and_owl_told_survives(settings, tmp_path, monkeypatch, stream):
    job = replace(settings, pattern="0.5", refine="sparseswaps", allocate="owl", stream=stream)
    run.run(replace(job, out=tmp_path / "alone"))
    job = replace(job, out=tmp_path / "out")
    run_until(job, monkeypatch, 3)
    monkeypatch.setattr("perp.allocate.owl", lambda *others: pytest.fail("the outliers are known"))
    run.run(job)
    one, other = (json.loads((tmp_path / name / "perp.json").read_text()) for name in ("alone", "out"))
    assert len(one["refined"]) == 2 * 7
    assert one["refined"] == other["refined"]
    assert one["sparsity"] == other["sparsity"]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")


@KINDS
def test_a_training_goes_on_where_it_was_written_down(settings, tmp_path, monkeypatch, stream):
    retrain = ("mask_lora", "norms", "head") if stream else ("spp", "norms", "head")
    job = replace(settings, retrain=retrain, steps=5, batch=2, reconstruct="none", stream=stream)
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    run.run(replace(job, out=tmp_path / "alone"))
    job = replace(job, out=tmp_path / "out")
    ended_after(resume.Checkpoint, ["write"], 2, monkeypatch, job)
    taken: list[int] = []
    step = AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda self, losses: taken.append(self.taken) or step(self, losses))
    # Trained, and not yet judged.
    ended_after(resume.Checkpoint, ["write"], 3, monkeypatch, job)
    run.run(job)
    assert taken == [2, 3, 4]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")


def test_cycles_distillation_and_rows_of_every_kind_are_gone_on_with(settings, tmp_path, monkeypatch):
    """Interrupted after each of its trainings; what was judged is not judged again."""
    job = replace(
        settings,
        retrain=("lora_prune", "norms", "head"),
        retrain_lr=1e-2,
        steps=2,
        batch=1,
        cycles=2,
        distil=0.3,
        compare=("pruned", "dense-retrained"),
        stream=False,
    )
    whole = run.run(replace(job, out=tmp_path / "alone"))
    job = replace(job, out=tmp_path / "out")
    for steps in (2, 1, 1):
        ended_after(resume.Checkpoint, ["write"], steps, monkeypatch, job)
    told = json.loads((tmp_path / "out" / record.RUN).read_text())["rows"]
    assert list(told) == [report.DENSE, report.DENSE_RETRAINED, report.PRUNED, report.RECONSTRUCTED]
    judged: list[str] = []
    row = Job.row
    monkeypatch.setattr(Job, "row", lambda self, stage, *others: judged.append(stage) or row(self, stage, *others))
    again = run.run(job)
    assert judged == [report.UNMERGED, report.RETRAINED]
    assert [row.perplexity for row in again.rows] == [row.perplexity for row in whole.rows]
    assert [row.stage for row in again.rows] == [*told, *judged]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")


@KINDS
def test_another_run_is_refused_naming_the_setting(settings, tmp_path, monkeypatch, stream):
    job = replace(settings, out=tmp_path / "out", stream=stream)
    run_until(job, monkeypatch, 1)
    before = hashes(tmp_path / "out")
    for changed, message in (
        (replace(job, epochs=2), "an unfinished run with epochs 1, not 2"),
        (replace(job, method="magnitude"), "with method 'wanda', not 'magnitude'"),
        (replace(job, windows=2), "with windows 3, not 2"),
        (replace(job, stream=not stream), f"with streamed {stream}, not {not stream}"),
    ):
        with pytest.raises(UserError, match=message):
            run.run(changed)
    assert hashes(tmp_path / "out") == before
    # Streamed or not, it goes on as it began where nobody says.
    assert made_by(replace(job, stream=None), monkeypatch) == 3
    run_until(replace(job, overwrite=True), monkeypatch, 1)
    assert made_by(replace(job, epochs=2, overwrite=True), monkeypatch) == 4
    assert not record.unfinished(tmp_path / "out")
    assert not [*(tmp_path / "out" / "perp").glob("stage-*")]


@KINDS
def test_shards_changed_between_runs_are_refused(settings, tmp_path, monkeypatch, stream):
    model = Path(shutil.copytree(settings.model, tmp_path / "model"))
    job = replace(settings, out=tmp_path / "out", model=str(model), stream=stream)
    run_until(job, monkeypatch, 3)
    shard = sorted(model.glob("*.safetensors"))[1]
    about = shard.stat()
    os.utime(shard, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    with pytest.raises(UserError, match=rf"{shard.name} has changed since the unfinished run"):
        run.run(job)
    os.utime(shard, ns=(about.st_atime_ns, about.st_mtime_ns))
    block = next((tmp_path / "out").rglob("block-00000.safetensors"))
    content = bytearray(block.read_bytes())
    content[-1] ^= 1
    block.write_bytes(content)
    with pytest.raises(UserError, match=r"block-00000\.safetensors is not what this run wrote"):
        run.run(job)


@pytest.fixture(scope="module")
def left(settings, tmp_path_factory) -> Path:
    """What an interrupted run has left: a block, a unit of the next, and a row."""
    out = tmp_path_factory.mktemp("left") / "out"
    with pytest.MonkeyPatch.context() as patch:
        run_until(replace(settings, out=out), patch, 3)
    return out


def of_json(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("run.json", lambda path: path.write_text(""), "run.json is damaged; pass --overwrite"),
        ("run.json", lambda path: path.write_bytes(b"\xff\x00"), "run.json is damaged"),
        ("run.json", lambda path: path.write_text("[1]"), "run.json is damaged"),
        ("run.json", of_json(lambda told: told.update(format=1)), "run.json is of another version of perp"),
        ("run.json", of_json(lambda told: told.pop("files")), "run.json is damaged"),
        ("run.json", of_json(lambda told: told.update(settings=3)), "run.json is damaged"),
        ("run.json", of_json(lambda told: told["rows"].update(dense=[])), "run.json is damaged"),
        ("run.json", of_json(lambda told: told["rows"]["dense"].update(zeros="no")), "run.json is damaged"),
        ("run.json", of_json(lambda told: told["rows"]["dense"].update(perplexity=[1])), "run.json is damaged"),
        ("block-00000.json", lambda path: path.write_text("{"), "block-00000.json is damaged; delete it"),
        ("block-00000.json", of_json(lambda told: told.update(checksums="ab")), "block-00000.json is damaged"),
        ("block-00000.json", of_json(lambda told: told.update(losses={"a": 3})), "block-00000.json is damaged"),
        ("block-00000.masks.safetensors", Path.unlink, "masks.safetensors is not what this run wrote"),
        ("unit-*.safetensors", lambda path: path.write_bytes(path.read_bytes()[:99]), "is damaged .*; delete it"),
        ("unit-*.safetensors", lambda path: path.write_bytes(b""), "is damaged .*; delete it"),
    ],
)
def test_a_damaged_or_handwritten_record_is_one_sentence(settings, left, tmp_path, name, damage, message):
    out = Path(shutil.copytree(left, tmp_path / "out"))
    damage(next(out.rglob(name)))
    with pytest.raises(UserError, match=message):
        run.run(replace(settings, out=out))


@pytest.mark.parametrize("content", ["", "{}", '["0.5/row"]', '["0.5/row", 3]', '["0.5/row", "half"]', "[[], []]"])
def test_damaged_shares_are_one_sentence(content, tmp_path):
    stage = Finished(tmp_path)
    given = [Pattern.parse("0.512345/row"), Pattern.parse("0.4/row")]
    stage.write_patterns(given)
    assert stage.patterns(2) == given
    (tmp_path / "patterns.json").write_text(content)
    with pytest.raises(UserError, match=r"patterns\.json is damaged; delete it and run again"):
        stage.patterns(2)


@KINDS
def test_a_full_disk_is_a_clean_stop(settings, finished, tmp_path, stream):
    job = replace(settings, out=tmp_path / "out", stream=stream)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # The record fits, and the first unit.
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, before[1]))
        with pytest.raises(UserError, match=r"could not be written \(.*; make room and give the same command"):
            run.run(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert record.unfinished(job.out)
    run.run(job)
    assert hashes(job.out) == hashes(finished(stream))


def test_a_finished_directory_is_refused_as_ever(settings, finished):
    with pytest.raises(UserError, match="is not empty; choose another output directory or pass --overwrite"):
        run.run(replace(settings, out=finished(True)))


def test_killed_at_random_moments_the_result_is_the_same():
    """The short form of `python -m tests.perp.kill`."""
    told = subprocess.run(
        [sys.executable, "-m", "tests.perp.kill", "--kills", "2", "--seed", "1", "--blocks", "2"],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert told.stdout.splitlines().count("the same") >= 2
