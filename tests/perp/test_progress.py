from __future__ import annotations

import io

import pytest
from rich.console import Console

from perp import progress
from perp.progress import Plain, Rich, Silent, choose, duration


def job(told) -> None:
    told.stage("reconstruct", 60)
    for number in range(60):
        told.unit(f"model.layers.{number}.self_attn", before=0.0123456, after=0.0098765)
    told.stage("perplexity wiki", 3)
    for _ in range(3):
        told.unit("", perplexity=12345.678)
    told.done()


def test_plain_lines_are_one_per_unit_and_short(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    stream = io.StringIO()
    job(Plain(stream))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 60 + 1
    assert max(map(len, lines)) <= 100
    assert lines[7].startswith("reconstruct  8/60  model.layers.7.self_attn  loss 0.0123 -> 0.00988")
    assert lines[7].endswith("GB")
    assert "left" in lines[7]
    assert lines[-1].startswith("perplexity wiki  3/3  perplexity 1.235e+04")


def test_plain_lines_of_short_units_are_thinned_but_each_stage_ends_with_one():
    stream = io.StringIO()
    job(Plain(stream))
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[1] for line in lines] == ["1/60", "60/60", "3/3"]


def test_an_open_stage_is_told_when_the_next_begins_and_done_is_idempotent():
    stream = io.StringIO()
    told = Plain(stream)
    told.stage("prune", 2)
    told.stage("retrain", 1)
    told.done()
    told.done()
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == ["prune", "retrain"]


def test_the_live_display_fits_a_hundred_columns():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    job(Rich(console))
    lines = [line for line in stream.getvalue().replace("\r", "\n").splitlines() if "60/60" in line]
    assert lines
    assert "loss 0.0123 -> 0.00988" in lines[-1]
    assert "GB" in lines[-1]
    assert max(len(line.split("\x1b[2K")[-1]) for line in lines) <= 100


def test_the_live_display_can_begin_again():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    told = Rich(console)
    job(told)
    job(told)


def test_a_terminal_gets_the_live_display_and_a_pipe_lines():
    assert isinstance(choose(Console(file=io.StringIO(), force_terminal=True)), Rich)
    assert isinstance(choose(Console(file=io.StringIO())), Plain)


def test_silence_is_silent(capsys):
    job(Silent())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "seconds, told",
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.7, "1h00m"),
        (8040, "2h14m"),
        (100_000, "27h46m"),
    ],
)
def test_durations(seconds, told):
    assert duration(seconds) == told
