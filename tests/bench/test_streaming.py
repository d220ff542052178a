"""The streaming bench: what a few blocks tell of all, its rows, and its workers for real on tiny models."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bench import gpu, registry, results
from bench.results import Row
from bench.streaming import __main__ as streaming
from bench.streaming import rows, worker
from bench.streaming.shared import NoTokenizer
from bench.streaming.subjects import DEVIATION, DRAWN, SUBJECTS, Numbers, write_random
from bench.streaming.worker import Job
from perp import adapters, manifest, packed_model, streamed_save
from perp.finished import Finished
from perp.prune import prune_model
from perp.residence import Streamed
from perp.stream import Stream
from perp.workload import shape_of

# Served by plain torch on a GPU, too.
TORCH_ONLY = {"pack", "pack_bits", "unpack_mask"}


def job(directory: Path, scratch: Path, **changes: Any) -> Job:
    return replace(Job(str(directory), 2, 16, 1, "wanda", True, "cpu", 1, str(scratch)), **changes)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    path.mkdir()
    write_random(SUBJECTS["30b"].rehearsed().config(2), path)
    return path


def test_the_shapes_are_the_real_ones() -> None:
    """Parameters in the blocks, of the published configurations."""
    published = {"30b": 29.6e9, "30b-retrain": 29.6e9, "30b-sparsegpt": 29.6e9, "70b": 68.5e9, "405b": 401.7e9}
    assert set(published) == {name for name, subject in SUBJECTS.items() if subject.gpu}
    for name, numbers in published.items():
        with torch.device("meta"):
            shape = shape_of(AutoModelForCausalLM.from_config(SUBJECTS[name].config(SUBJECTS[name].blocks)))
        assert shape.inside == pytest.approx(numbers, rel=0.01)
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(SUBJECTS["30b-retrain"].config(1))
    assert real.get_input_embeddings().weight.shape == (50272, 7168)
    assert real.get_output_embeddings().weight is real.get_input_embeddings().weight


def test_random_weights_repeat_between_processes_and_not_between_rows(tmp_path: Path) -> None:
    config = SUBJECTS["30b"].rehearsed().config(1)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_random(config, tmp_path / name)
    for shard in (tmp_path / "one").glob("*.safetensors"):
        tensors, again = load_file(shard), load_file(tmp_path / "other" / shard.name)
        assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    name = "model.decoder.layers.0.fc1.weight"
    (weight,) = [found[name] for found in map(load_file, (tmp_path / "one").glob("*.safetensors")) if name in found]
    assert weight.dtype == torch.bfloat16
    assert weight.float().std().item() == pytest.approx(DEVIATION, rel=0.05)
    # 20 million numbers of 4 million drawn: each is there five times, in another place of its row.
    large = Numbers(torch.bfloat16).tensor(torch.Size((20_480, 1024)), "large.weight")
    assert len(large[:, :8].unique(dim=0)) == len(large)
    assert torch.equal(large.flatten()[:1024], large.flatten()[DRAWN : DRAWN + 1024])


def test_a_line_through_two_numbers_of_blocks() -> None:
    assert rows.extrapolated({1: 5.0, 3: 9.0}, 48) == 5 + 2 * 47
    assert rows.extrapolated({3: 9.0, 1: 5.0}, 3) == 9
    # Each block's own share and the head's are told apart: not what 48 models of one block would take.
    assert rows.extrapolated({1: 100.0, 3: 100.0}, 48) == 100


def test_more_blocks_take_what_the_median_one_takes_and_their_share_of_the_rest() -> None:
    """The first of three has something compiled, the last has less to do: neither counts 45 times more."""
    assert rows.all_blocks(100.0, [60.0, 10.0, 9.0], 48) == pytest.approx(100 + 45 * (10 + 21 / 3))
    assert rows.all_blocks(30.0, [10.0, 10.0, 4.0], 3) == 30


def retraining(blocks: int, packing: float, training: float, writing: float, step: float) -> dict[str, Any]:
    peaks = {"packing": packing, "training": training, "writing": writing}
    return {"blocks": blocks, "peaks": peaks, "each": [9.0, 8.0, step, step, 3 * step], "device": "Some GPU"}


def test_the_phase_that_is_largest_with_all_blocks_is_told() -> None:
    """With three blocks writing is the largest; with 48, training."""
    runs = {1: retraining(1, 2e9, 3e9, 4e9, 0.05), 3: retraining(3, 3e9, 4.6e9, 5e9, 0.09)}
    memory, rate = rows.retrained(SUBJECTS["30b-retrain"], runs, verified=True)
    assert memory.ours == pytest.approx(3e9 + 0.8e9 * 47)
    assert (memory.unit, memory.better, memory.target, memory.met()) == ("bytes", "lower", 40e9, False)
    assert rate.ours == pytest.approx(2048 / (0.05 + 0.02 * 47))
    assert (rate.unit, rate.better, rate.target, rate.met()) == ("tokens/s", "higher", 1500, True)
    assert "1 and 3 blocks run, 48 extrapolated" in memory.shape
    assert memory.verified
    assert rate.verified
    assert not any(row.verified for row in rows.retrained(SUBJECTS["30b-retrain"], runs, verified=False))


def test_packed_weights_and_adapters_grow_by_the_block(tmp_path: Path) -> None:
    """What is predicted of four blocks from one and two is what four have."""
    held: dict[int, float] = {}
    for blocks in (1, 2, 4):
        place = tmp_path / str(blocks)
        place.mkdir()
        write_random(SUBJECTS["30b-retrain"].rehearsed().config(blocks), place)
        stream, stage = Stream(str(place)), Finished(tmp_path / f"stage-{blocks}")
        prune_model(stream.model, None, "magnitude", "2:4", residence=Streamed(stream, stage))
        masks = stage.all_masks(blocks)
        about = manifest.build(method="", pattern="", masks=masks, data={}, seeds={})
        streamed_save.save(stream, stage, NoTokenizer(), tmp_path / f"packed-{blocks}", about, packed=True)
        model = packed_model.load_weights(tmp_path / f"packed-{blocks}")
        adapters.attach(model)
        held[blocks] = sum(parameter.nbytes for parameter in model.parameters())
    assert rows.extrapolated({1: held[1], 2: held[2]}, 4) == held[4]


@pytest.mark.parametrize("changes", [{}, {"method": "sparsegpt"}, {"method": "magnitude", "steps": 4}])
def test_a_worker_measures_a_result_whose_ops_are_gated(tiny: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    found = worker.execute(job(tiny, tmp_path, **changes))
    assert found["blocks"] == 2
    assert len(found["each"]) == changes.get("steps", 2)
    assert min(found["each"]) > 0
    called = {op.removesuffix("_backward") for op, _ in found["served"]}
    assert called - TORCH_ONLY <= set(gpu.STREAMS)
    assert not [path for path in tmp_path.iterdir() if path.name != "tiny"]
    if "steps" in changes:
        assert set(found["peaks"]) == {"packing", "training", "writing"}
        assert found["losses"][-1] < found["losses"][0]


def test_the_rows_of_a_gpu_are_gated_by_the_tests_of_their_kernels_and_of_streaming() -> None:
    ops = registry.load()
    tests = gpu.tests_of_all()[gpu.STREAM]
    assert set(tests) == {gpu.STREAMED}.union(*(ops[name].gpu_tests for name in gpu.STREAMS))
    assert len(set(tests)) == len(tests)
    assert all((gpu.TESTS / name).exists() for name in tests)


def row(**changes: Any) -> Row:
    told = {"op": "stream", "kernel": "peak memory, streamed", "shape": "OPT-30B", "device": "Some GPU"}
    common = {"dtype": "bfloat16", "commit": "0123", "ours": 1.0, "peers": {}, "unit": "bytes", "better": "lower"}
    return Row(**{**told, **common, "target": 2.0, "limit": None, "peak_bytes": 1, "verified": True, **changes})


def test_rows_of_other_ops_stay_beside_those_of_streaming_in_their_order() -> None:
    ops = [row(op="gram_", shape=shape) for shape in "ba"]
    other, old, new = row(shape="LLaMA-2-70B"), row(), row(ours=3.0)
    assert streaming.merge([*ops, old, other], [new]) == [*ops, other, new]


def given(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """What a worker's process comes to, in place of the process."""

    def run(self: streaming.Bench, job: Job, before: Any = ()) -> dict[str, Any]:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(streaming.Bench, "_in_a_process_of_its_own", run)


def test_a_missed_target_is_a_row_and_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = {"blocks": 22, "each": [1.0], "seconds": 1.0, "host_bytes": 10**9, "device_bytes": 0, "device": "Some CPU"}
    given(monkeypatch, found)
    monkeypatch.setattr(streaming, "write_random", lambda *_: None)
    out = tmp_path / "rows.json"
    for passed in (False, True):
        told = ["--tests-passed"] if passed else []
        assert streaming.main(["--rows", "1.1b", "--cache", str(tmp_path), "--out", str(out), *told]) == 0
        (found_row,) = results.read(out)
        assert found_row.met() is False
        assert found_row.verified is passed


@pytest.mark.parametrize(
    "error, told",
    [
        (subprocess.TimeoutExpired("worker", 5), "the time was up"),
        (subprocess.CalledProcessError(-9, "worker"), "its process ended with -9"),
    ],
)
def test_a_row_that_was_not_measured_is_told_and_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, told: str
) -> None:
    given(monkeypatch, error)
    monkeypatch.setattr(streaming, "write_random", lambda *_: None)
    out = tmp_path / "rows.json"
    assert streaming.main(["--rows", "1.1b", "--cache", str(tmp_path), "--out", str(out)]) == 1
    assert f"1.1b is not measured: {told}" in capsys.readouterr().err
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_is_ended_when_the_time_is_up_and_one_that_fails_is_told(tmp_path: Path) -> None:
    options = streaming._parser().parse_args(["--seconds", "0.2"])
    bench = streaming.Bench(options, tmp_path, verified=False)
    with pytest.raises(subprocess.TimeoutExpired):
        bench._in_a_process_of_its_own(job(tmp_path / "nowhere", tmp_path))
    with pytest.raises(TimeoutError):
        bench.measure("1.1b")
    bench.deadline = None
    with pytest.raises(subprocess.CalledProcessError):
        bench._in_a_process_of_its_own(job(tmp_path / "nowhere", tmp_path), before=["false"])


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--rows", "nonsense"], "choose among 1.1b"),
        (["--rows", "1.1b", "--size", "tiny"], "choose among 30b"),
        (["--rows", "30b-retrain", "--blocks", "2"], "two numbers of blocks"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert streaming.main(arguments) == 2
    assert told in capsys.readouterr().err
