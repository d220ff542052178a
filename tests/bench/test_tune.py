"""The tuner takes the fastest of what is right, and leaves the rest to the default."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import tune
from perp_kernels.triton import launch
from perp_kernels.triton.launch import Config, Target

GPU = Target(91, 4)
DEFAULT = Config({"BLOCK": 64}, num_warps=4, num_stages=2)
SECONDS = {64: 1.0, 32: 0.5, 16: 0.99, 128: 0.1, 256: 0.2, 512: 0.3}


def call() -> Tensor:
    """A kernel that fails with 128, is wrong with 256 and spills with 512."""
    block = launch.configure("square", GPU, "K=8", DEFAULT).tiles["BLOCK"]
    if block == 128:
        raise RuntimeError("out of resources")
    if launch._compiled is not None:
        launch._compiled.append(SimpleNamespace(n_spills=4 if block == 512 else 0))
    return torch.full((3,), 2.0 if block == 256 else 1.0)


def elapsed(called: Callable[[], Any]) -> float:
    called()
    return SECONDS[launch._overrides["square"]["BLOCK"]]


def search(*blocks: int) -> tune.Found:
    return tune.search("square", call, [{"BLOCK": block, "num_warps": 8} for block in blocks], elapsed)


def test_the_fastest_of_the_right_ones_wins() -> None:
    assert search(16, 128, 256, 512, 32) == tune.Found("K=8", {"BLOCK": 32, "num_warps": 8}, 0.5, 1.0)


def test_too_small_a_gain_leaves_the_default() -> None:
    assert search(16, 128, 256, 512) == tune.Found("K=8", None, 1.0, 1.0)


def test_results_are_compared_exactly_where_they_are_exact() -> None:
    one = torch.tensor([1.0, -3.0], dtype=torch.bfloat16)
    assert tune.close([one, torch.tensor([True])], [one * (1 + 2**-7), torch.tensor([True])])
    assert not tune.close(one, one + 0.5)
    assert not tune.close(torch.full((2,), torch.nan), torch.ones(2))
    assert not tune.close(torch.tensor([1, 2]), torch.tensor([1, 3]))


def test_what_is_found_is_what_configure_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sm_91.json"
    monkeypatch.setattr(launch, "TUNING", tmp_path)
    path.write_text(json.dumps({"other": {"a": {"BN": 1}}, "square": {"K=8": {"BLOCK": 16}, "K=9": {"BLOCK": 8}}}))
    launch._tuned.cache_clear()
    assert launch.configure("square", GPU, "K=8", DEFAULT) == Config({"BLOCK": 16}, num_warps=4, num_stages=2)
    # What the file holds already is no default to be compared with.
    found = search(32)
    assert found.default_seconds == 1.0
    tune.keep(path, "square", found)
    launch._tuned.cache_clear()
    assert launch.configure("square", GPU, "K=8", DEFAULT) == Config({"BLOCK": 32}, num_warps=8, num_stages=2)
    tune.keep(path, "square", search(16))
    assert json.loads(path.read_text()) == {"other": {"a": {"BN": 1}}, "square": {"K=9": {"BLOCK": 8}}}
    launch._tuned.cache_clear()


def test_no_candidate_of_a_space_repeats() -> None:
    for space in tune.SPACES.values():
        assert len({tuple(sorted(candidate.items())) for candidate in space}) == len(space)


def test_without_a_gpu_nothing_is_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tune.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
