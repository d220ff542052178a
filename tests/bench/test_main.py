"""`python -m bench`, run for real on its smallest case."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import results
from bench.__main__ import main


def test_quick_run_writes_rows_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    assert main(["--op", "pack", "--quick", "--out", str(out)]) == 0
    (row,) = results.read(out)
    assert (row.op, row.unit, row.better, row.verified) == ("pack", "ms", "lower", False)
    assert row.ours > 0
    assert list(row.peers) == ["boolean indexing"]
    assert row.limit is not None
    printed = capsys.readouterr().out
    assert "not verified" in printed
    assert "--verify" in printed


def test_list_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--op", "select"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("select float32 N=") for line in lines)


def test_an_unknown_op_is_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--op", "nonsense"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
