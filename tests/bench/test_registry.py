"""The registry lists what it can build, call and name."""

from __future__ import annotations

import pytest
import torch

from bench import registry
from bench.measure import OURS
from bench.memory import storages
from bench.registry import LIMIT, Case

OPS = registry.load()
CASES = [case for op in OPS.values() for case in op.cases]
QUICK = [case for case in CASES if case.quick]


def test_every_op_of_the_package_is_listed_under_its_own_name() -> None:
    solvers = {"gram_", "masked_refit", "select", "sparsegpt", "sparsegpt_block_", "swap_round_", "wanda_select"}
    assert set(OPS) == solvers | {"masked_lora_linear", "pack", "sparse_linear", "unpack"}
    assert all(case.op == op.name for op in OPS.values() for case in op.cases)


def test_no_line_is_listed_twice() -> None:
    keys = [(case.op, case.shape, case.dtype) for case in CASES]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_has_tests_to_gate_it_and_one_quick_case(op: registry.Op) -> None:
    assert op.tests
    assert sum(case.quick for case in op.cases) == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.shape}-{case.dtype}")
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


def tensors(tree: object) -> list[torch.Tensor]:
    """Tensors anywhere in a nest of sequences, mappings and objects."""
    if isinstance(tree, torch.Tensor):
        return [tree.detach()]
    if isinstance(tree, dict):
        return [found for value in tree.values() for found in tensors(value)]
    if isinstance(tree, list | tuple):
        return [found for value in tree for found in tensors(value)]
    return tensors(vars(tree)) if hasattr(tree, "__dict__") else []
