from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from perp import report
from perp.report import Report, Row, number


def reports() -> list[Report]:
    dense = [
        Row(report.DENSE, {"wiki": 13.1879, "sotu": 20.889}, 0.0003),
        Row(report.DENSE_RETRAINED, {"wiki": 10.3824, "sotu": 20.442}, 0.0003, 0.036, 99.0, 4.31),
    ]
    pruned = Row(report.PRUNED, {"wiki": 121.0401, "sotu": 162.596}, 0.5, 0.0, 37.0, 1.6)
    return [
        Report("wanda 0.5", [*dense, pruned]),
        Report(
            "wanda 2:4",
            [*dense, pruned, Row(report.RETRAINED, {"wiki": 29.9, "sotu": 55.0}, 0.5, 0.00026, 90, 4.4, 35_136)],
        ),
    ]


def shown(found: list[Report]) -> str:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(report.table(found))
    return console.file.getvalue()


def test_the_table_tells_every_row_once_in_eighty_columns():
    told = shown(reports())
    rows = dict(line.strip().split("  ", 1) for line in told.splitlines() if "%" in line)
    assert {name: row.split() for name, row in rows.items()} == {
        "dense": ["13.188", "20.889", "0.03%"],
        "dense retrained": ["10.382", "20.442", "0.03%", "3.6%", "1m39s", "4.3", "GB"],
        "wanda 0.5 pruned": ["121.0", "162.6", "50.00%", "37s", "1.6", "GB"],
        "wanda 2:4 pruned": ["121.0", "162.6", "50.00%", "37s", "1.6", "GB"],
        "wanda 2:4 retrained": ["29.900", "55.000", "50.00%", "0.026%", "35.1k", "1m30s", "4.4", "GB"],
    }
    assert told.count("20.889") == 1
    assert "wiki: held out from the text trained on" in told
    assert "…" not in told


@pytest.mark.parametrize(
    "value, told",
    [(13.18785, "13.188"), (99.9994, "99.999"), (121.04, "121.0"), (123456.0, "1.2e+05"), (math.inf, "inf")],
)
def test_perplexities_are_told_as_exactly_as_they_deserve(value, told):
    assert number(value) == told


def test_the_report_is_left_as_rows_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    written = report.write(reports(), tmp_path / "new")
    assert [path.name for path in written] == ["report.json", "report.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.json", "report.png"]
    rows = json.loads(written[0].read_text())
    assert rows[1]["title"] == "wanda 2:4"
    assert rows[1]["rows"][-1]["perplexity"] == {"wiki": 29.9, "sotu": 55.0}
    from matplotlib.image import imread

    height, width, _ = imread(written[1]).shape
    assert width > height > 300


def test_one_report_on_one_text_and_a_diverged_model_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [Row(report.DENSE, {"a": 12.0}, 0.0), Row(report.PRUNED, {"a": math.inf}, 0.9)]
    assert (report.write([Report("magnitude 0.9", rows)], tmp_path)[1]).stat().st_size > 1000


def test_an_interrupted_picture_leaves_the_old_one(tmp_path, monkeypatch):
    def fail(found, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    pytest.importorskip("matplotlib")
    (tmp_path / "report.png").write_bytes(b"old")
    monkeypatch.setattr(report, "picture", fail)
    with pytest.raises(KeyboardInterrupt):
        report.write(reports(), tmp_path)
    assert (tmp_path / "report.png").read_bytes() == b"old"
    assert not list(tmp_path.glob(".unfinished*"))
