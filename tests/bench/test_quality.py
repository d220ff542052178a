"""The quality bench: its rows, its resumption, and its figures on a tiny model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import perp
from bench.quality import report
from bench.quality.__main__ import Bench, in_a_process_of_its_own, main
from bench.quality.protocol import Protocol
from bench.quality.rows import ROWS, Row
from bench.quality.store import Store
from bench.quality.worker import Job, execute
from perp.progress import Silent
from tests.perp import tiny

ANCHORED = {
    "dense": 13.188,
    "dense-mask-lora": 10.382,
    "magnitude-50": 339.038,
    "wanda-50": 32.309,
    "sparsegpt-50": 26.332,
    "wanda-50-half": 28.962,
    "magnitude-50-half": 145.451,
    "wanda-60": 90.296,
    "wanda-2:4": 121.0,
    "sparsegpt-2:4": 50.407,
    "wanda-2:4-half": 90.444,
    "wanda-2:4-block-1e-3": 60.634,
    "wanda-2:4-block-5e-3": 48.055,
    "wanda-2:4-block": 48.055,
    "wanda-2:4-norms": 40.261,
    "wanda-2:4-mask-lora": 29.861,
}


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    folder = tmp_path_factory.mktemp("tiny")
    other = folder / "other.txt"
    other.write_text(tiny.article(999, sentences=40))
    return Protocol(
        name="tiny",
        model=str(tiny.model_dir(folder)),
        text=str(tiny.text_file(folder)),
        other=str(other),
        seqlen=32,
        windows=4,
        steps=2,
        batch=2,
        text_windows=3,
        other_windows=2,
    )


def job(row: Row, protocol: Protocol, validate: bool = False) -> Job:
    return Job(row, protocol, validate, start=None, save=None)


def test_every_anchor_has_its_row() -> None:
    assert {name: row.anchor.wiki for name, row in ROWS.items() if row.anchor} == ANCHORED
    assert all(row.start is None or row.start in ROWS for row in ROWS.values())
    assert all(row.start is None or row.method is None for row in ROWS.values())


def test_jobs_survive_the_way_to_their_process(tmp_path: Path) -> None:
    for row in ROWS.values():
        sent = Job(row, Protocol(), False, tmp_path / "start", None)
        assert Job.from_json(json.loads(json.dumps(sent.to_json()))) == replace(sent, row=replace(row, anchor=None))


def test_settings_hold_all_that_the_model_depends_on() -> None:
    row, protocol = ROWS["wanda-2:4-mask-lora"], Protocol()
    settings = row.settings(protocol)
    assert json.loads(json.dumps(settings)) == settings
    assert settings != row.at_rate(5e-3).settings(protocol)
    assert settings != row.settings(replace(protocol, windows=64))
    assert {**settings["start"], "protocol": settings["protocol"]} == ROWS["wanda-2:4"].settings(protocol)
    assert replace(row, label="other words", anchor=None).settings(protocol) == settings


def test_a_rate_belongs_to_the_last_training_stage() -> None:
    assert ROWS["wanda-2:4-norms"].at_rate(0.5).retrain == replace(ROWS["wanda-2:4-norms"].retrain, lr=0.5)
    assert ROWS["wanda-50-half"].at_rate(0.5).reconstruct == replace(ROWS["wanda-50-half"].reconstruct, lr=0.5)
    assert ROWS["wanda-50-half"].at_rate(0.5).name == "wanda-50-half@0.5"
    with pytest.raises(ValueError, match="no learning rate"):
        ROWS["wanda-50"].at_rate(0.5)


def test_the_figures_of_the_dense_model_are_its_perplexities(protocol: Protocol) -> None:
    found = execute(job(ROWS["dense"], protocol), Silent())
    model, tokenizer = perp.load(protocol.model)
    assert found["perplexity"] == {
        name: perp.perplexity(model, windows) for name, windows in protocol.judged_windows(tokenizer, False).items()
    }
    assert list(found["perplexity"]) == ["wiki", "sotu"]
    assert (found["zeros"], found["retrained"]) == (0, 0)
    assert found["peak_bytes"] > 1e8


def test_validation_sees_no_window_that_is_reported(protocol: Protocol) -> None:
    _, tokenizer = perp.load(protocol.model)
    reported = protocol.judged_windows(tokenizer, False)
    validation = protocol.judged_windows(tokenizer, True)
    assert list(validation) == ["validation"]
    assert all(not bool((windows[:, None] == validation["validation"]).all(-1).any()) for windows in reported.values())


@pytest.mark.parametrize(
    "name", ["sparsegpt-2:4", "wanda-2:4-swaps-refit", "magnitude-50-half", "wanda-2:4-block-1e-3", "dense-mask-lora"]
)
def test_rows_make_the_models_they_name(name: str, protocol: Protocol) -> None:
    found = execute(job(ROWS[name], protocol), Silent())
    assert found["zeros"] == (0 if name.startswith("dense") else pytest.approx(0.5, abs=0.01))
    assert (found["retrained"] > 0) == name.startswith("dense")
    assert found["seconds"] > 0


def test_a_run_resumes_and_continues_saved_models(protocol: Protocol, tmp_path: Path) -> None:
    path, row = tmp_path / "results.json", ROWS["wanda-2:4-norms"]
    measured: list[str] = []

    def measure(job: Job) -> dict:
        measured.append(job.row.name)
        return execute(job, Silent())

    def bench(**changes: object) -> Bench:
        return Bench(replace(protocol, **changes), Store(path), tmp_path / "cache", measure=measure)

    assert bench().run(row)
    assert measured == ["wanda-2:4", "wanda-2:4-norms"]
    start, found = Store(path).rows()
    assert found["seconds"] > start["seconds"] > 0
    assert found["zeros"] == start["zeros"]
    assert found["retrained"] > start["retrained"] == 0
    assert found["anchor"] == asdict(row.anchor)

    assert not bench().run(row)
    assert len(measured) == 2
    # The saved start serves a changed row too, and no longer once it was made otherwise.
    assert bench().run(row.at_rate(1e-2))
    assert measured[2:] == ["wanda-2:4-norms@0.01"]
    assert bench(windows=3).run(row)
    assert measured[3:] == ["wanda-2:4", "wanda-2:4-norms"]
    assert bench(windows=3).run(row, redo=True)
    assert measured[5:] == ["wanda-2:4-norms"]


def test_a_process_of_its_own_gives_the_same_figures(protocol: Protocol) -> None:
    sent = job(ROWS["wanda-60"], protocol)
    apart, here = in_a_process_of_its_own(sent), execute(sent, Silent())
    assert apart["perplexity"] == here["perplexity"]
    assert apart["zeros"] == here["zeros"] > 0.5


def test_a_row_measured_under_other_settings_is_not_there(tmp_path: Path) -> None:
    store, settings = Store(tmp_path / "results.json"), ROWS["dense"].settings(Protocol())
    store.put({"row": "dense", "settings": settings})
    store.put({"row": "wanda-50@0.1", "settings": {}})
    store.put({"row": "magnitude-50", "settings": {}})
    again = Store(store.path)
    assert again.has("dense", settings)
    assert not again.has("dense", ROWS["dense"].settings(Protocol(windows=64)))
    assert not again.has("wanda-50", {})
    assert [row["row"] for row in again.rows()] == ["dense", "magnitude-50", "wanda-50@0.1"]


def test_tables_and_picture_show_ours_beside_the_anchor(tmp_path: Path) -> None:
    figures = {"zeros": 0.5, "retrained": 0.00026, "seconds": 70.4, "peak_bytes": 2_500_000_000}
    anchored = {"label": "Wanda", "perplexity": {"wiki": 30.0, "sotu": 50.0}, "anchor": asdict(ROWS["wanda-50"].anchor)}
    rows = [{**anchored, **figures}, {"label": "own", "perplexity": {"wiki": 5.0}, "anchor": None, **figures}]
    lines = report.markdown(rows).splitlines()
    assert lines[2] == (
        "| Wanda | 30.000 | 32.309 | -7.1 % | 50.000 | 45.042 | +11.0 % | 50.00 % | 0.026 % | 70 | 74 | 2.50 GB |"
    )
    assert lines[3] == "| own | 5.000 |  |  |  |  |  | 50.00 % | 0.026 % | 70 |  | 2.50 GB |"
    assert len({line.count("|") for line in lines}) == 1
    assert report.table(rows).row_count == 2
    report.picture(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_options_are_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--rows", "nonsense"], ["--lr", "1e-3"], ["--rows", "dense", "--validate", "--lr", "1e-3"]):
        assert main(options) == 2
        assert capsys.readouterr().err.count("\n") == 1
