"""The quality bench: its rows, its resumption, and its figures on a tiny model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import perp
from bench import results
from bench.quality import report
from bench.quality.__main__ import Bench, in_a_process_of_its_own, main
from bench.quality.page import page
from bench.quality.picture import OTHERS, _panels, picture
from bench.quality.protocol import Protocol
from bench.quality.rows import ROWS, SEED, Row, Training, named
from bench.quality.store import Store
from bench.quality.worker import Job, _change, execute
from perp import manifest
from perp.blocks import all_prunable
from perp.errors import UserError
from perp.iterate import divided, schedule
from perp.progress import Silent
from perp.refine.watch import Refinement
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
    "wanda-2:4-norms-2e-3": 40.261,
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


@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2:4", "4:8"])
def test_best_has_rivals_at_its_pattern(pattern: str) -> None:
    assert ROWS[f"best-{pattern}"].pattern == pattern
    rivals = {
        (row.method, row.reconstruct)
        for row in ROWS.values()
        if row.pattern == pattern and not (row.retrain or row.refine or row.refit)
    }
    half = Training(("kept", "norms"), 3e-3)
    assert rivals >= {("wanda", None), ("sparsegpt", None), ("wanda", half)}


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


def test_committed_rows_are_described_as_they_were_measured() -> None:
    measured = Store(results.FOLDER / "quality-smollm2-135m.json").rows()
    assert measured
    for row in measured:
        assert row["settings"] == named(row["row"]).settings(Protocol()), row["row"]


def test_a_seed_raises_that_of_the_start_too() -> None:
    row, protocol = ROWS["wanda-2:4-mask-lora"], Protocol()
    assert row.at_seed(0) is row
    second = row.at_seed(2)
    assert (second.name, second.source, second.anchor) == (
        "wanda-2:4-mask-lora@seed=2",
        ROWS["wanda-2:4"].at_seed(2),
        None,
    )
    settings = second.settings(protocol)
    assert (settings.pop("seed"), settings["start"].pop("seed")) == (2, 2)
    assert settings == row.settings(protocol)


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
    assert list(validation) == ["validation", "validation, other"]
    for windows in reported.values():
        for tuned in validation.values():
            assert not bool((windows[:, None] == tuned).all(-1).any())


def test_the_other_validation_follows_what_is_reported(protocol: Protocol) -> None:
    _, tokenizer = perp.load(protocol.model)
    everything = perp.windows(tokenizer, perp.documents(protocol.other).texts, protocol.seqlen)
    count = len(everything)
    for reported, behind in ((2, 2), (count - 1, 1)):
        found = replace(protocol, other_windows=reported).judged_windows(tokenizer, True)["validation, other"]
        assert torch.equal(found, everything[reported : reported + behind])
    with pytest.raises(UserError, match=f"no window behind the {count} reported"):
        replace(protocol, other_windows=count).judged_windows(tokenizer, True)


@pytest.mark.parametrize(
    "name", ["sparsegpt-2:4", "wanda-2:4-swaps-refit", "magnitude-50-half", "wanda-2:4-block-1e-3", "dense-mask-lora"]
)
def test_rows_make_the_models_they_name(name: str, protocol: Protocol) -> None:
    found = execute(job(ROWS[name], protocol), Silent())
    assert found["zeros"] == (0 if name.startswith("dense") else pytest.approx(0.5, abs=0.01))
    assert (found["retrained"] > 0) == name.startswith("dense")
    assert found["seconds"] > 0
    assert (found["local_error"] is not None) == ("swaps" in name)


def test_the_local_error_is_the_mean_change_of_refined_linears(protocol: Protocol) -> None:
    refined = [Refinement(4, 3, 1), Refinement(200, 100, 1), Refinement(1, 1, 0), Refinement(0, 0, 0)]
    # By hand: a quarter less, half less and no less, of three linears; the fourth has no error to lower.
    assert _change(refined) == pytest.approx(-0.25)
    assert _change([]) is _change(refined[3:]) is None
    row = ROWS["wanda-2:4-sparseswaps"]
    found = execute(job(row, protocol), Silent())["local_error"]
    model, tokenizer = perp.load(protocol.model)
    windows = perp.sample(protocol.training_windows(tokenizer), protocol.windows, 0)
    pruned = perp.prune_model(model, windows, "wanda", "2:4", refine=perp.RefineSettings("sparseswaps"))
    ratios = [each.after / each.before for each in pruned.refined.values()]
    assert len(ratios) == len(all_prunable(model))
    assert found == pytest.approx(sum(ratios) / len(ratios) - 1)
    assert -1 < found < 0


@pytest.mark.parametrize("part", ["full", "head", "lora_prune", "scale_lora", "spp"])
def test_each_mode_retrains_its_own_parameters(part: str, protocol: Protocol) -> None:
    row = ROWS[f"wanda-2:4-{part.replace('_', '-')}"]
    found = execute(job(replace(row, start=None), protocol), Silent())
    model, _ = perp.load(protocol.model)
    head = model.get_output_embeddings().weight
    linears = [linear.weight for linear in all_prunable(model).values()]
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = {"full": total, "head": 16 * sum(head.shape)}.get(part, 16 * sum(sum(w.shape) for w in linears))
    assert found["retrained"] == trained / total
    assert found["perplexity"]["wiki"] != pytest.approx(perp.perplexity(model, _judged(protocol)), rel=1e-6)


def _judged(protocol: Protocol) -> torch.Tensor:
    return protocol.judged_windows(perp.load(protocol.model)[1], False)["wiki"]


def test_cycles_divide_the_steps_and_prune_on_the_way(protocol: Protocol) -> None:
    row, three = ROWS["wanda-50-cycles"], replace(protocol, steps=3)
    found = execute(job(row, three), Silent())
    model, tokenizer = perp.load(protocol.model)
    windows = three.training_windows(tokenizer)
    training = perp.RetrainSettings(parts={"mask_lora"}, lr=row.retrain.lr, steps=3, batch=protocol.batch)
    perp.prune_retrain(
        model, perp.sample(windows, 4, 0), windows, schedule("0.5", 3), divided(training, 3), granularity="block"
    )
    judged = three.judged_windows(tokenizer, False)
    assert found["perplexity"] == {name: perp.perplexity(model, tokens) for name, tokens in judged.items()}
    at_once = execute(job(replace(row, cycles=1), three), Silent())
    assert at_once["zeros"] == found["zeros"] == pytest.approx(0.5, abs=0.01)
    assert at_once["perplexity"] != found["perplexity"]


def test_another_seed_makes_other_models_from_a_start_of_its_own(protocol: Protocol, tmp_path: Path) -> None:
    path, row = tmp_path / "results.json", ROWS["wanda-2:4-norms"]
    bench = Bench(protocol, Store(path), tmp_path / "cache", measure=lambda job: execute(job, Silent()))
    for seed in (0, 1):
        assert bench.run(row.at_seed(seed))
    rows = {found["row"]: found for found in Store(path).rows()}
    assert list(rows) == ["wanda-2:4", "wanda-2:4@seed=1", "wanda-2:4-norms", "wanda-2:4-norms@seed=1"]
    assert rows["wanda-2:4"]["perplexity"] != rows["wanda-2:4@seed=1"]["perplexity"]
    seeds = [manifest.read(folder)["seeds"] for folder in sorted((tmp_path / "cache" / "tiny").iterdir())]
    assert seeds == [{"calibration": 0, "training": 1}, {"calibration": 1, "training": 2}]
    assert not bench.run(row.at_seed(1))


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


FIGURES = {"zeros": 0.5, "retrained": 0.00026, "seconds": 70.4, "peak_bytes": 2_500_000_000}


def test_tables_show_ours_beside_the_anchor() -> None:
    anchored = {"label": "Wanda", "perplexity": {"wiki": 30.0, "sotu": 50.0}, "anchor": asdict(ROWS["wanda-50"].anchor)}
    rows = [
        {"row": "wanda-50", **anchored, **FIGURES},
        {
            "row": "own@0.1",
            "label": "own",
            "perplexity": {"wiki": 5.0},
            "anchor": None,
            **FIGURES,
            "local_error": -0.301,
        },
    ]
    lines = report.markdown(rows).splitlines()
    assert lines[2] == (
        "| Wanda | 30.000 | 32.309 | -7.1 % | 50.000 | 45.042 | +11.0 % | 50.00 % |  | 0.026 % | 70 | 74 | 2.50 GB "
        "| `wanda-50` |"
    )
    assert lines[3] == "| own | 5.000 |  |  |  |  |  | 50.00 % | -30.1 % | 0.026 % | 70 |  | 2.50 GB | `own` |"
    assert len({line.count("|") for line in lines}) == 1
    assert report.table(rows).row_count == 2


def test_seeds_of_a_row_are_one_line_of_their_mean_and_spread() -> None:
    found = [(0, 27.0, 10.0), (1, 28.0, 20.0), (2, 30.0, 60.0)]
    base = ROWS["wanda-2:4"]
    rows = [
        {
            **FIGURES,
            "row": base.at_seed(seed).name,
            "label": base.at_seed(seed).label,
            "perplexity": {"wiki": perplexity},
            "anchor": asdict(base.anchor) if not seed else None,
            "seconds": seconds,
            "peak_bytes": 10**9 * (seed + 1),
            "local_error": perplexity / -100,
        }
        for seed, perplexity, seconds in found
    ]
    # By hand: the mean is 85 / 3, the squares of the distances to it add up to 14 / 3, and n - 1 is 2.
    assert report.markdown(rows).splitlines()[2] == (
        "| Wanda 2:4, 3 seeds | 28.333 ± 1.528 | 121.000 | -76.6 % | 50.00 % | -28.3 % | 0.026 % | 30 | 74 | 3.00 GB "
        "| `wanda-2:4` |"
    )
    assert "28.000 |" in report.markdown(rows[1:2]).splitlines()[2]
    old = {**rows[0], "local_error": None}
    assert "| 50.00 % |  | 0.026 % |" in report.markdown([old, *rows[1:]])


def test_the_picture_has_a_panel_for_each_pattern(
    protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["dense", "wanda-2:4", "wanda-2:4-half", "wanda-2:4-norms", "wanda-60", "best-0.7", "best-4:8"]
    rows = [
        {
            **FIGURES,
            "row": name,
            "label": ROWS[name].label,
            "perplexity": {"wiki": 100.0 - number},
            "anchor": ROWS[name].anchor and asdict(ROWS[name].anchor),
            "settings": ROWS[name].settings(protocol),
            "seconds": 10.0 * (number + 1),
        }
        for number, name in enumerate(names)
    ]
    panels = {title: [row["row"] for row in of] for title, of in _panels(rows, "wiki").items()}
    assert panels == {
        "2:4": ["wanda-2:4-norms", "wanda-2:4-half", "wanda-2:4"],
        "dense": ["dense"],
        OTHERS: ["best-4:8", "best-0.7", "wanda-60"],
    }
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig

    def keep(figure: Figure, path: Path, dpi: int) -> None:
        drawn.append(figure)
        save(figure, path, dpi=dpi)

    monkeypatch.setattr(Figure, "savefig", keep)
    picture(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    # Both panels span the seconds of all points, the anchors' too.
    limits = {axes.get_xlim() for axes in drawn[0].axes if axes.axison}
    assert len(limits) == 1
    assert min(limits)[0] < 20
    assert max(limits)[1] > 808


COMMITTED = results.FOLDER / "quality-smollm2-135m.json"


def _files(out: Path) -> tuple[str, bytes]:
    return out.with_suffix(".md").read_text(encoding="utf-8"), out.with_suffix(".png").read_bytes()


def test_the_page_and_the_picture_come_from_the_results_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "quality.json"
    out.write_text(COMMITTED.read_text())
    monkeypatch.setattr("subprocess.run", None)
    assert main(["--rows", "wanda-60", "--out", str(out), "--cache", str(tmp_path)]) == 0
    written, drawn = _files(out)
    assert out.read_text() == COMMITTED.read_text()
    assert drawn.startswith(b"\x89PNG")
    assert "](quality.png)" in written
    assert "--redo --rows NAME" in written
    assert all(f"| `{row['row'].partition(SEED)[0]}` |" in written for row in Store(out).rows())


def test_validation_has_a_page_that_says_so(protocol: Protocol) -> None:
    row = {"row": "dense", "label": "dense", "perplexity": {"validation": 5.0}, "anchor": None, **FIGURES}
    told = page([row], protocol, True, Path("picture.png"))
    assert "python -m bench.quality --validate --protocol FILE --redo --rows NAME" in told
    assert "validation, other" in told
    assert "test part" not in told


def test_rows_of_another_clone_are_merged_and_none_of_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "ours.json", tmp_path / "other.json"
    rows = {row["row"]: row for row in Store(COMMITTED).rows()}
    Store(out).put(rows["dense"])
    seed = ROWS["wanda-50"].at_seed(1)
    Store(other).put({**rows["wanda-50"], "row": seed.name, "settings": seed.settings(Protocol())})
    more = [str(other), str(COMMITTED)]
    assert main(["--merge", ",".join(more), "--out", str(out), "--cache", str(tmp_path)]) == 0
    assert {row["row"] for row in Store(out).rows()} == {*rows, seed.name}
    assert "wanda-50" in _files(out)[0]

    capsys.readouterr()
    before = out.read_text()
    stray = rows["wanda-60"]
    for changed in (
        {"settings": rows["wanda-50"]["settings"]},
        {"row": "nonsense"},
        {"perplexity": {"validation": 1.0}},
        {"settings": {**stray["settings"], "protocol": asdict(Protocol(windows=64))}},
    ):
        path = tmp_path / "stray.json"
        path.write_text(json.dumps({"rows": [rows["dense"], {**stray, "seconds": 0.0, **changed}]}))
        assert main(["--merge", str(path), "--out", str(out)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert out.read_text() == before
    assert main(["--merge", str(tmp_path / "absent.json"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_wrong_options_are_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (
        ["--rows", "nonsense"],
        ["--lr", "1e-3"],
        ["--rows", "dense", "--validate", "--lr", "1e-3"],
        ["--rows", "dense", "--seeds", "0,-1"],
    ):
        assert main(options) == 2
        assert capsys.readouterr().err.count("\n") == 1
