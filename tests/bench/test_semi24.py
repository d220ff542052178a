"""The rows of 2:4 on the sparse tensor cores: what is asked of them, and that their arguments and checks run."""

from __future__ import annotations

import pytest
import torch

from bench.ops import semi24
from bench.registry import Case


@pytest.mark.parametrize("case", [case for case in semi24.CASES if case.quick], ids=lambda case: case.op)
def test_quick_cases_run_and_can_fail(case: Case) -> None:
    arguments = case.make(0)
    case.check(arguments)
    assert torch.equal(case.ours(arguments), case.ours(arguments))
    for peer in case.peers.values():
        assert peer(arguments) is not None
    arguments.prepared.values.view(-1)[5] += 1
    if case.op == "tiled24_linear":
        with pytest.raises(AssertionError, match="the output is off"):
            case.check(arguments)


def test_bytes_and_flops_of_a_2_to_4_product() -> None:
    case = next(case for case in semi24.CASES if case.shape.startswith("T=1 N=4096 K=4096"))
    assert case.work.bytes == 2 * (4096 * 2048 + 8192) + 4096 * 4096 // 8
    assert case.work.flops == 4096 * 4096


@pytest.mark.parametrize(
    "T,N,K,expected",
    [
        (1, 4096, 4096, {"torch dense": 1 / 1.3, "cuSPARSELt": 1.0}),
        (64, 14336, 4096, {"torch dense": 1 / 1.5, "cuSPARSELt": 1.0}),
        (512, 4096, 4096, {"cuSPARSELt": 1 / 0.95}),
        (8192, 4096, 4096, {"torch dense": 1 / 1.1, "cuSPARSELt": 1 / 0.95}),
    ],
)
def test_targets(T: int, N: int, K: int, expected: dict[str, float]) -> None:
    assert {target.peer: target.ratio for target in semi24.targets(T, N, K)} == expected
