"""Every kernel compiled ahead of time, as its launcher would have it compiled, for GPUs that need not be there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bench.resources import SHARED_LIMIT, TARGETS, TENSOR_CORE, cases, compile_launch, launches
from perp_kernels.triton import launch
from perp_kernels.triton.launch import Config, Target

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="the interpreter has no compiler"
)

# Kernels that move or add numbers but multiply no matrices, and products too small for the newest instructions.
NO_PRODUCT = {
    "add_parts_kernel",
    "select_groups_kernel",
    "select_row_kernel",
    "prune_block_kernel",
    "pair_rows_kernel",
    "pair_groups_kernel",
    "trade_kernel",
}
WHOLE_TILES = {"gram_kernel", "value_gradient_kernel", "adapter_gradients_kernel"}

# Each kernel once or twice, in the layouts in which it differs: bench.resources, which takes minutes, has the rest.
NAMES = {
    "gram_ K=4096",
    "select 2:4 4096x4096",
    "select 0.5/row 8192x28672",
    "sparsegpt 2:4 b=128",
    "sparsegpt 0.5/row b=128",
    "swap_round_ 0.6 4096x14336",
    "swap_round_ 2:4 4096x4096",
    "wanda_select 2:4 4096x4096",
    "wanda_select 0.5/row 4096x4096",
    "unpack semi24",
    "sparse_linear bitmap T=1",
    "sparse_linear semi24 T=64",
    "sparse_linear_backward bitmap",
    "masked_lora_linear bitmap r=16",
    "masked_lora_linear bitmap r=128",
    "masked_lora_linear dense r=16",
    "add_lowrank_ bitmap r=16",
    "scale_lora_linear semi24 r=16",
}
CASES = [(name, call) for name, call in cases() if name in NAMES]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"sm_{target.arch}")
@pytest.mark.parametrize("name,call", CASES, ids=[name for name, _ in CASES])
def test_kernels_use_tensor_cores_and_fit_the_chip(name: str, call: Callable[[], Any], target: Target) -> None:
    for launched in launches(call, target):
        compiled = compile_launch(launched, target)
        multiplies = launched.kernel.__name__ not in NO_PRODUCT and launched.switches.get("MODE") != 0
        if launched.kernel.__name__ in WHOLE_TILES:
            assert compiled.tensor_core == TENSOR_CORE[target.arch][0], compiled
        elif multiplies:
            assert compiled.tensor_core, compiled
        assert compiled.spilled == 0, compiled
        assert compiled.shared <= SHARED_LIMIT[target.arch], compiled


def test_a_measured_configuration_replaces_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sm_91.json").write_text('{"gram": {"K=64": {"BLOCK": 256, "num_warps": 16}}}')
    monkeypatch.setattr(launch, "TUNING", tmp_path)
    default, gpu = Config({"BLOCK": 128, "BT": 64}), Target(91, 100)
    assert launch.configure("gram", gpu, "K=64", default) == Config({"BLOCK": 256, "BT": 64}, num_warps=16)
    assert launch.configure("gram", gpu, "K=32", default) == default
    assert launch.configure("gram", Target(92, 100), "K=64", default) == default
    with pytest.raises(ValueError, match="of BLOCK, BT has no BN"):
        default.with_values({"BN": 1})


def test_every_named_case_exists() -> None:
    assert {name for name, _ in CASES} == NAMES


def test_launches_are_recorded_without_a_gpu() -> None:
    assert not torch.cuda.is_initialized()
    (name, call), gpu = CASES[0], Target(90, 132)
    (launched,) = launches(call, gpu)
    assert name == "gram_ K=4096"
    assert launched.grid == (32 * 33 // 2, 1)
