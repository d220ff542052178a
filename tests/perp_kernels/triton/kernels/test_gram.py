from typing import Any

import pytest
import torch

import perp_kernels as pk
from perp_kernels import dispatch
from perp_kernels.triton import launch
from tests.perp_kernels.oracles import DEVICE, assert_no_worse, normal

from .small import DTYPES, INTERPRETED, triton

SHAPES = [(0, 3), (1, 1), (7, 13), *([(40, 200)] if INTERPRETED else [(300, 1300), (512, 1536)])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,K", SHAPES)
def test_adds_to_what_is_there(dtype: torch.dtype, tokens: int, K: int) -> None:
    x, before = normal(tokens, K, dtype=dtype), normal(K, K, seed=5)
    results = []
    for _ in range(2):
        H = before.clone()
        with triton("gram_"):
            pk.gram_(H, x)
        results.append(H)
    exact = before.double() + x.double().t() @ x.double()
    assert_no_worse(results[0], before + x.float().t() @ x.float(), exact, factor=3.0)
    assert torch.equal(*results)


def test_experts_and_strides() -> None:
    x, offsets = normal(9, 40)[:, ::2], torch.tensor([2, 2, 9], device=DEVICE)
    H = torch.zeros(3, 20, 20, device=DEVICE)
    with pk.backend("triton"):
        pk.gram_(H, x, offsets)
    torch.testing.assert_close(H, torch.stack([x[:2].t() @ x[:2], torch.zeros_like(H[0]), x[2:].t() @ x[2:]]))


@pytest.mark.parametrize("configuration", [{"BLOCK": 32}, {"num_warps": 8}])
def test_the_default_serves_too(configuration: dict[str, Any]) -> None:
    x = normal(3, 4, 33, dtype=torch.float16)
    with pk.backend("triton"), launch.override(gram=configuration):
        H = pk.gram_(torch.zeros(33, 33, device=DEVICE), x)
    flat = x.reshape(-1, 33).float()
    torch.testing.assert_close(H, flat.t() @ flat)


def test_without_a_request_the_cpu_is_served_as_ever() -> None:
    with dispatch.served() as served:
        pk.gram_(torch.zeros(4, 4), normal(9, 4).cpu())
    assert ("gram_", "triton") not in served
