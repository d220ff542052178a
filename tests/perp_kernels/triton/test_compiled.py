"""Every kernel compiled ahead of time, as its launcher would have it compiled, for GPUs that need not be there."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bench.resources import SHARED_LIMIT, TARGETS, TENSOR_CORE, built, cases, compile_launch, launches, single
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

# The other dtypes once per kernel, on one architecture.
HOPPER = TARGETS[1]
OF_EACH_DTYPE = {
    "gram_ K=4096",
    "unpack bitmap",
    "sparse_linear bitmap T=1",
    "sparse_linear bitmap T=64",
    "sparse_linear_backward bitmap",
    "masked_lora_linear bitmap r=16",
    "scale_lora_linear bitmap r=16",
}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"sm_{target.arch}")
@pytest.mark.parametrize("name,call", CASES, ids=[name for name, _ in CASES])
def test_kernels_use_tensor_cores_and_fit_the_chip(name: str, call: Callable[[], Any], target: Target) -> None:
    for launched in launches(call, target):
        compiled = compile_launch(launched, target)
        multiplies = launched.kernel.__name__ not in NO_PRODUCT and launched.switches.get("MODE") != 0
        multiplies = multiplies and launched.config.tiles.get("TOKENS") != 1
        if launched.kernel.__name__ in WHOLE_TILES:
            assert compiled.tensor_core == TENSOR_CORE[target.arch][0], compiled
        elif multiplies:
            assert compiled.tensor_core, compiled
        assert compiled.spilled == 0, compiled
        assert compiled.shared <= SHARED_LIMIT[target.arch], compiled


@pytest.mark.parametrize("name", sorted(OF_EACH_DTYPE))
def test_float16_compiles_to_what_bfloat16_does(name: str) -> None:
    call = next(call for other, call in cases(torch.float16) if other == name)
    for launched in launches(call, HOPPER):
        compiled = compile_launch(launched, HOPPER)
        if launched.kernel.__name__ in WHOLE_TILES:
            assert compiled.tensor_core == TENSOR_CORE[HOPPER.arch][0], compiled
        assert compiled.spilled == 0, compiled
        assert compiled.shared <= SHARED_LIMIT[HOPPER.arch], compiled


@pytest.mark.parametrize("name", sorted(OF_EACH_DTYPE))
def test_float32_is_multiplied_as_float32(name: str) -> None:
    """Without the tensor cores, which would round the factors to TF32."""
    call = next(call for other, call in cases(torch.float32) if other == name)
    for launched in launches(call, HOPPER):
        compiled = compile_launch(launched, HOPPER)
        assert not compiled.tensor_core, compiled
        assert compiled.spilled == 0, compiled
        assert compiled.shared <= SHARED_LIMIT[HOPPER.arch], compiled


def test_sizes_of_one_compile() -> None:
    """A launch knows an argument of 1 as a constant: the kernels have to take numbers of either kind."""
    for call in single(torch.bfloat16):
        for launched in launches(call, HOPPER):
            compile_launch(launched, HOPPER)


def test_products_copy_sixteen_bytes_at_a_time() -> None:
    """Asynchronous copies of 16 bytes into shared memory, which the compiler chooses where it knows what is aligned."""
    for name in ("gram_ K=4096", "masked_lora_linear bitmap r=16"):
        call = next(call for other, call in CASES if other == name)
        launched = next(one for one in launches(call, HOPPER) if one.kernel.__name__ in WHOLE_TILES)
        ptx = built(launched, HOPPER).asm["ptx"]
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]+\], \[[^]]+\], (0x[0-9a-f]+|\d+)", ptx)
        assert copies, name
        assert {int(size, 0) for size in copies} == {16}


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
