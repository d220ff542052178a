"""`make gpu` rehearsed on the CPU: the same program, the smallest shapes, without tests of kernels that do not run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import device, gpu, model, registry, results, timing
from bench.__main__ import main
from bench.registry import LIMIT

GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def measure_the_cpu_again() -> object:
    yield
    device.use("cpu")


def test_a_rehearsal_writes_rows_that_are_not_verified(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    assert gpu.main(["--device", "cpu", "--ops", "gram", "--out", str(out)]) == 0
    (row,) = results.read(out)
    assert (row.op, row.shape, row.dtype, row.verified) == ("gram_", "T=64 K=48", "bfloat16", False)
    assert set(row.peers) == {"full product", "bf16 product, fp32 out"}
    printed = capfd.readouterr().out
    assert "tests not run, memory check not run, benchmark passed, 1 rows" in printed


def test_the_rows_of_streaming_are_rehearsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out = tmp_path / "rows.json"
    assert gpu.main(["--device", "cpu", "--ops", "stream", "--out", str(out)]) == 0
    rows = results.read(out)
    assert sorted(row.unit for row in rows) == ["bytes"] * 5 + ["s", "tokens/s"]
    assert all("(tiny)" in row.shape and row.ours > 0 for row in rows)
    assert not any(row.verified or row.target for row in rows)
    assert [row.better for row in rows if row.unit == "tokens/s"] == ["higher"]
    assert "stream: tests not run, memory check not run, benchmark passed, 7 rows" in capfd.readouterr().out
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != out]


@GPU
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--ops", "gram"]) == 2
    assert capsys.readouterr().err == "there is no GPU that torch sees: run this where there is one.\n"


def test_an_unknown_op_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--ops", "gram,nonsense"]) == 2
    assert "sparse_linear" in capsys.readouterr().err


def test_a_step_that_fails_or_hangs_is_told_from_one_that_passes() -> None:
    assert gpu._step(["true"], 10, {}) == gpu.PASSED
    assert gpu._step(["false"], 10, {}) == gpu.FAILED
    assert gpu._step(["sleep", "60"], 0, {}) == gpu.FAILED
    assert gpu._step(["sh", "-c", 'test "$PERP_GPU" = small'], 10, {"PERP_GPU": "small"}) == gpu.PASSED


def test_failed_tests_leave_rows_unverified(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = []

    def step(command: list[str], *rest: object, **more: object) -> str:
        commands.append(command)
        return gpu.FAILED if "pytest" in command else gpu.PASSED

    monkeypatch.setattr(gpu, "_step", step)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    for cached in (gpu._tests, gpu._memory_check):
        cached.cache_clear()
    outcome = gpu._run("gram_", ("test_gram.py",), tmp_path / "rows.json", deadline=1e12)
    assert (outcome.tests, outcome.memory_check, outcome.benchmark) == (gpu.FAILED, gpu.ABSENT, gpu.PASSED)
    assert "--tests-passed" not in commands[-1]
    assert outcome.failed()


def test_every_op_with_gpu_cases_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with_cases = {name for name, op in registry.load().items() if op.gpu_cases}
    assert main(["--gpu-cases", "--list", "--op", ",".join(sorted(with_cases))]) == 0
    listed = {line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == with_cases


def test_a_timed_bound_is_the_limit(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert main(["--gpu-cases", "--quick", "--op", "masked_lora_linear", "--out", str(out)]) == 0
    timed, memory = results.read(out)
    assert (timed.unit, memory.unit) == ("ms", "bytes")
    assert timed.limit
    assert LIMIT not in timed.peers
    assert set(timed.peers) == {"published layer", "published, compiled"}


def test_no_case_begins_when_the_time_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    assert main(["--gpu-cases", "--quick", "--op", "unpack", "--out", str(out), "--seconds", "1e-9"]) == 1
    assert results.read(out) == []
    assert "not measured: the time was up" in capsys.readouterr().err


def test_a_whole_model_is_pruned_to_its_pattern(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert model.main(["--size", "tiny", "--out", str(out), "--methods", "wanda"]) == 0
    (row,) = results.read(out)
    assert (row.op, row.unit, row.target, row.verified) == ("prune_model", "s", None, False)
    assert row.ours > 0


def test_the_stopwatch_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timing.stopwatch() is timing.wall
    device.use("cuda")
    assert timing.stopwatch() is timing.between_events
