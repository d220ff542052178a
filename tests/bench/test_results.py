"""Rows keep the agreed schema and survive the disk; the table prints what may be printed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from bench import limits, machine, results, table
from bench.registry import Work
from bench.results import Row

ROW = Row(
    op="select",
    kernel="reference",
    shape="N=8 K=8",
    dtype="float32",
    device="Some CPU, 2 threads",
    commit="0123456789ab",
    ours=2.0,
    peers={"stable sort": 5.0},
    unit="ms",
    better="lower",
    target=4.0,
    limit=0.5,
    peak_bytes=1 << 20,
    verified=True,
)
SCHEMA = (
    "op kernel shape dtype device commit ours peers unit better target limit peak_bytes verified".split()  # noqa: SIM905
)


def test_schema_is_the_agreed_one() -> None:
    assert list(asdict(ROW)) == SCHEMA


def test_rows_survive_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "device.json"
    assert results.read(path) == []
    results.write(path, [ROW, replace(ROW, target=None, limit=None)])
    assert results.read(path) == [ROW, replace(ROW, target=None, limit=None)]
    assert list(json.loads(path.read_text())[0]) == SCHEMA
    assert [file.name for file in path.parent.iterdir()] == ["device.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    results.write(path, [ROW])
    with pytest.raises(TypeError):
        results.write_json(path, [{"ours": object()}])
    assert results.read(path) == [ROW]
    assert len(list(tmp_path.iterdir())) == 1


def test_new_rows_replace_those_of_their_op_and_device_only() -> None:
    elsewhere, other = replace(ROW, device="Other CPU, 2 threads"), replace(ROW, op="pack")
    retired, new = replace(ROW, shape="N=1 K=1"), replace(ROW, ours=1.0)
    assert results.merge([elsewhere, other, retired, ROW], [new]) == [elsewhere, other, new]


@pytest.mark.parametrize(
    "row, shown, hidden",
    [
        (ROW, ["2.50x", "met", "1.0 MiB"], ["not verified"]),
        (replace(ROW, ours=10.0), ["0.50x", "MISSED"], ["not verified"]),
        (replace(ROW, verified=False), ["not verified"], ["2.50x"]),
        (
            replace(ROW, unit="bytes", ours=float(2 << 20), peers={"stable sort": float(8 << 20)}),
            ["2.0 MiB", "4.00x"],
            [],
        ),
        (replace(ROW, ours=0.0, target=None), ["0"], ["met"]),
        (
            replace(ROW, op="generate", unit="tokens/s", better="higher", ours=12.0, target=6.0),
            ["tokens per second", "ours / stable sort", "2.40x", "met (at least 6)"],
            ["MiB", "at most"],
        ),
        (replace(ROW, unit="tokens/s", better="higher", ours=3.0), ["0.60x", "MISSED (at least 4)"], []),
        (
            replace(ROW, op="generate", unit="bytes"),
            ["resident memory above the imports and the tokenizer"],
            ["chained"],
        ),
    ],
)
def test_table(row: Row, shown: list[str], hidden: list[str]) -> None:
    console = Console(width=200)
    with console.capture() as captured:
        for one in table.tables([row]):
            console.print(one)
    text = captured.get()
    assert all(word in text for word in ["stable sort", row.shape, row.kernel, row.device, *shown])
    assert not any(word in text for word in hidden)


def test_limit_is_the_slower_of_moving_and_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "bandwidth", lambda: 1e9)
    monkeypatch.setattr(limits, "matrix_rate", lambda dtype: 1e12)
    assert limits.milliseconds(Work(bytes=10**6), ROW.dtype) == pytest.approx(1.0)
    assert limits.milliseconds(Work(bytes=10**6, flops=10**10), ROW.dtype) == pytest.approx(10.0)


def test_device_names_make_file_names() -> None:
    assert machine.slug("AMD EPYC (TM) 7.5") == "amd-epyc-tm-7.5"
    assert machine.cpu_name()
    assert machine.commit()
