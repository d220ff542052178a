import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from perp import report, resume, run
from perp.errors import UserError
from perp.progress import Silent
from perp.settings import RunSettings
from tests.perp import tiny


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> RunSettings:
    directory = tmp_path_factory.mktemp("job")
    return RunSettings(
        model=str(tiny.model_dir(directory, "opt")),
        out=directory / "out",
        data=str(tiny.text_file(directory)),
        retrain=("mask_lora", "norms", "head"),
        distil=0.3,
        epochs=1,
        steps=4,
        batch=1,
        windows=2,
        seqlen=16,
        eval_windows=2,
        device="cpu",
        resume=True,
    )


class Interrupt(Silent):
    """Ctrl-C after so many steps of retraining; counts the blocks pruned."""

    def __init__(self, steps: int) -> None:
        self.left, self.pruned, self.at = steps, 0, ""

    def stage(self, name: str, total: int) -> None:
        self.at = name

    def unit(self, name: str, **figures: float) -> None:
        self.pruned += self.at == "prune"
        if self.at == "retrain":
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt


def test_an_interrupted_job_goes_on_to_the_same_model(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    whole = run.run(replace(settings, resume=False, out=tmp_path / "whole"))
    job = replace(settings, out=tmp_path / "out")
    first, second = Interrupt(2), Interrupt(9)
    with pytest.raises(KeyboardInterrupt):
        run.run(job, first)
    left = tmp_path / "out" / "perp" / "unfinished"
    assert {path.name for path in left.iterdir()} == {
        "job.json",
        "masks.safetensors",
        "model.safetensors",
        "retrain.pt",
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"perp"}
    again = run.run(job, second)
    assert (first.pruned, second.pruned) == (4, 0)
    assert second.left == 9 - 2
    assert [row.perplexity for row in again.rows] == [row.perplexity for row in whole.rows]
    assert [row.stage for row in again.rows] == [report.DENSE, report.PRUNED, report.RECONSTRUCTED, report.RETRAINED]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    assert not left.exists()


def test_what_another_job_left_and_what_is_damaged(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    job = replace(settings, out=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run.run(job, Interrupt(1))
    with pytest.raises(UserError, match="unfinished is of another job; delete it, or choose another"):
        run.run(replace(job, pattern="0.6"))
    left = tmp_path / "out" / "perp" / "unfinished"
    weights = (left / "model.safetensors").read_bytes()
    (left / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(UserError, match="unfinished is damaged; delete it to begin again"):
        run.run(job)
    told = json.loads((left / "job.json").read_text())
    assert told["identity"]["settings"]["pattern"] == "0.5"
    (left / "job.json").write_text("{")
    with pytest.raises(UserError, match="unfinished is damaged"):
        run.run(job)
    fresh = run.run(replace(job, resume=False))
    assert fresh.rows
    assert not left.exists()
