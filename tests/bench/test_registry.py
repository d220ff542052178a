"""The registry lists what it can build, call and name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import registry
from bench.measure import OURS
from bench.memory import storages
from bench.registry import LIMIT, Case

OPS = registry.load()
CASES = [case for op in OPS.values() for case in op.cases]
GPU_CASES = [case for op in OPS.values() for case in op.gpu_cases]
EVERY = [*CASES, *GPU_CASES]
QUICK = [case for case in EVERY if case.quick]
KERNEL_TESTS = Path(__file__).parents[1] / "perp_kernels" / "triton" / "kernels"


def test_every_op_of_the_package_is_listed_under_its_own_name() -> None:
    solvers = {"gram_", "masked_refit", "select", "sparsegpt", "sparsegpt_block_", "swap_round_", "wanda_select"}
    linears = {"add_lowrank_", "masked_lora_linear", "pack", "sparse_linear", "unpack"}
    assert set(OPS) == solvers | linears | {"tiled24_assign_", "tiled24_linear"}
    assert all(case.op == op.name for op in OPS.values() for case in (*op.cases, *op.gpu_cases))


def test_no_line_is_listed_twice() -> None:
    for listed in (CASES, GPU_CASES):
        keys = [(case.op, case.shape, case.dtype) for case in listed]
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_has_tests_to_gate_it_and_one_quick_case(op: registry.Op) -> None:
    assert bool(op.tests) == bool(op.cases)
    assert sum(case.quick for case in op.cases) == bool(op.cases)
    assert sum(case.quick for case in op.gpu_cases) == bool(op.gpu_cases)
    assert bool(op.gpu_tests) == bool(op.gpu_cases)
    assert all((KERNEL_TESTS / name).exists() for name in op.gpu_tests)


def test_the_rows_asked_of_a_gpu_are_listed_with_their_targets() -> None:
    """The table of issue 4: shapes, tokens, and what ours may take of a peer's time."""
    due = {
        ("masked_lora_linear", "T=4096 N=8192 K=28672"): {"limit": 1.12, "published layer": 1 / 1.25},
        ("masked_lora_linear", "T=1024 N=5120 K=13824"): {"limit": 1.35, "published, compiled": 1 / 1.2},
        ("gram_", "T=16384 K=4096"): {"full product": 1 / 18, "bf16 product, fp32 out": 1 / 1.4},
        ("gram_", "T=16384 K=14336"): {"bf16 product, fp32 out": 1 / 1.6},
        ("sparsegpt", "N=4096 K=4096 pattern=2:4"): {"column loop": 1 / 15},
        ("sparsegpt", "N=4096 K=11008 pattern=0.5"): {"column loop": 1 / 6},
        ("sparsegpt_block_", "N=4096 K=11008 pattern=2:4"): {"column loop": 1 / 20},
        ("sparse_linear", "T=1 N=4096 K=4096 pattern=0.5"): {"torch dense": 1.0},
        ("sparse_linear", "T=16 N=11008 K=4096 pattern=0.5"): {"torch dense": 1 / 1.3},
        ("sparse_linear", "T=2048 N=8192 K=28672 pattern=0.5"): {"torch dense": 1 / 0.84},
        ("sparse_linear", "T=4096 N=4096 K=4096 pattern=0.5"): {"torch dense": 1 / 0.92},
    }
    for (op, words), ratios in due.items():
        (case,) = [c for c in OPS[op].gpu_cases if f"{c.shape} ".startswith(f"{words} ") and "dense" not in c.shape]
        listed = {target.peer: target.ratio for target in case.targets}
        assert all(listed[peer] == pytest.approx(ratio) for peer, ratio in ratios.items()), case.shape
    (block,) = [c for c in OPS["sparsegpt"].gpu_cases if "7B" in c.shape and "2:4" in c.shape]
    assert block.most == 12_000 / 32


@pytest.mark.parametrize("case", EVERY, ids=lambda case: f"{case.op}-{case.shape}-{case.dtype}")
def test_cases_are_whole(case: Case) -> None:
    assert case.work.bytes > 0
    assert case.peers
    assert not {OURS, "limit"} & set(case.peers)
    assert all("=" in word for word in case.shape.split())
    assert {target.peer for target in case.targets} <= {*case.peers, LIMIT}
    if case.memory:
        assert {target.peer for target in case.memory.targets} <= set(case.memory.peers)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.op)
def test_argument_sets_share_nothing_and_repeat(case: Case) -> None:
    first, second, again = (tensors(case.make(seed)) for seed in (0, 1, 0))
    assert first
    addresses = [{storage._cdata for storage in storages(found)} for found in (first, second, again)]
    assert not addresses[0] & addresses[1]
    assert not addresses[0] & addresses[2]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.op)
def test_ours_passes_its_own_check_and_peers_run(case: Case) -> None:
    arguments = case.make(0)
    case.check(arguments)
    assert all(tensors(peer(arguments)) for peer in case.peers.values())
    assert case.bound is None or tensors(case.bound(arguments))


def tensors(tree: object) -> list[torch.Tensor]:
    """Tensors anywhere in a nest of sequences, mappings and objects."""
    if isinstance(tree, torch.Tensor):
        return [tree.detach()]
    if isinstance(tree, dict):
        return [found for value in tree.values() for found in tensors(value)]
    if isinstance(tree, list | tuple):
        return [found for value in tree for found in tensors(value)]
    return tensors(vars(tree)) if hasattr(tree, "__dict__") else []
