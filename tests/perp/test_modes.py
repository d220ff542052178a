"""Each mode against its formula written out in float64, and against those of its neighbours, which must fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from perp import adapters, parts
from perp.errors import UserError
from perp.linear import SparseLinear
from perp.modes import MODES

R, ALPHA, N, K = 3, 6.0, 10, 24
S = ALPHA / R
FORMULAS = {
    "mask_lora": lambda W, M, A, B: W + S * M * (B @ A),
    "scale_lora": lambda W, M, A, B: W * (B @ A),
    "spp": lambda W, M, A, B: W + S * W * (B @ A),
    "lora_prune": lambda W, M, A, B: W + S * (B @ A),
    "lora": lambda W, M, A, B: W + S * (B @ A),
}


def made(mode: str, layout: str = "dense", dtype: torch.dtype = torch.float64) -> tuple[SparseLinear, Tensor, Tensor]:
    """A layer whose adapter has been moved off its start, its pruned weight and its mask; some kept weights are 0."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N).to(dtype)
    with torch.no_grad():
        linear.weight[::3, ::5] = 0
    mask = torch.zeros(N, K, dtype=torch.bool).view(N, K // 4, 4)
    mask = mask.scatter(-1, torch.rand(N, K // 4, 4).topk(2).indices, True).view(N, K)
    layer = SparseLinear.from_linear(linear, mask, layout)
    adapters.attach(layer, mode, r=R, alpha=ALPHA)
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor += 0.3 * torch.randn_like(factor)
    return layer, linear.weight.detach() * mask, mask


@pytest.mark.parametrize("layout", ["dense", "bitmap", "semi24"])
@pytest.mark.parametrize("mode", MODES)
def test_computes_its_own_formula_and_no_other(mode: str, layout: str) -> None:
    layer, W, M = made(mode, layout)
    A, B = (factor.detach() for factor in (layer.lora_A, layer.lora_B))
    x = torch.randn(2, 5, K, dtype=torch.float64)
    found = layer(x) - layer.bias
    for name, formula in FORMULAS.items():
        same = name == mode or {name, mode} == {"lora", "lora_prune"}
        error = (found - x @ formula(W, M, A, B).T).abs().max()
        assert bool(error < 1e-12) is same, name
    torch.testing.assert_close(layer.weight, FORMULAS[mode](W, M, A, B), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_formula(mode: str) -> None:
    layer, W, M = made(mode, "bitmap")
    parts.select_trainable(layer, {mode, "biases"})
    x = torch.randn(7, K, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    A, B = (factor.detach().clone().requires_grad_(True) for factor in (layer.lora_A, layer.lora_B))
    bias, again = layer.bias.detach().clone().requires_grad_(True), x.detach().clone().requires_grad_(True)
    (again @ FORMULAS[mode](W, M, A, B).T + bias).square().sum().backward()
    pairs = ((layer.lora_A, A), (layer.lora_B, B), (layer.bias, bias), (x, again))
    for found, expected in pairs:
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-11)
    assert layer.values.grad is None


@pytest.mark.parametrize("layout", ["dense", "bitmap"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "lora"])
def test_merges_to_its_masked_formula(mode: str, layout: str) -> None:
    layer, W, M = made(mode, layout)
    A, B = (factor.detach() for factor in (layer.lora_A, layer.lora_B))
    x = torch.randn(6, K, dtype=torch.float64)
    before = layer(x)
    adapters.merge(layer)
    assert layer.mode is None
    merged = layer.to_linear().weight
    torch.testing.assert_close(merged, FORMULAS[mode](W, M, A, B) * M, rtol=1e-12, atol=1e-14)
    assert not merged[~M].any()
    assert not torch.signbit(merged[~M]).any()
    gap = (layer(x) - before).abs().max()
    assert (gap > 0.1) if mode == "lora_prune" else (gap < 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("r", [1, 3, 16])
def test_starts_at_the_pruned_weight(mode: str, r: int) -> None:
    layer, _, _ = made(mode, dtype=torch.float32)
    adapters.detach(layer)
    plain = layer.weight
    adapters.attach(layer, mode, r=r, alpha=ALPHA, seed=2)
    torch.testing.assert_close(layer.weight, plain, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    assert layer.lora_A.shape == (r, K)
    assert layer.lora_B.shape == (N, r)
    if mode == "scale_lora":
        assert torch.equal(layer.lora_A, torch.full((r, K), r**-0.5))
        assert torch.equal(layer.lora_B, torch.full((N, r), r**-0.5))
    else:
        assert not layer.lora_B.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_stay_fp32_beside_16_bit_weights(mode: str, dtype: torch.dtype) -> None:
    layer, W, M = made(mode, dtype=dtype)
    A, B = (factor.detach().double() for factor in (layer.lora_A, layer.lora_B))
    assert layer.lora_A.dtype == torch.float32
    x = torch.randn(9, K, dtype=dtype)
    exact = x.double() @ FORMULAS[mode](W.double(), M, A, B).T + layer.bias.double()
    rounded = (x @ FORMULAS[mode](W.double(), M, A, B).to(dtype).T + layer.bias).double()
    # lora rounds A, B and both branches, where the plain product rounds one weight.
    assert (layer(x).double() - exact).abs().max() <= 4 * (rounded - exact).abs().max()
    assert layer(x).dtype == dtype


def test_lora_refuses_to_merge_and_is_taken_off_instead() -> None:
    layer, W, _ = made("lora")
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    with pytest.raises(UserError, match="cannot be merged without filling the zeros; keep the adapters"):
        adapters.merge(layer)
    assert layer.mode == "lora"
    (found,) = adapters.detach(layer).values()
    assert found.scale == S
    assert torch.equal(found.A, A)
    assert torch.equal(found.B, B)
    assert torch.equal(layer.weight, W)


@pytest.mark.parametrize("mode", ["spp", "lora"])
def test_compiles_without_graph_breaks(mode: str) -> None:
    layer, _, _ = made(mode, dtype=torch.float32)
    x = torch.randn(6, K)
    try:
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
    finally:
        torch.compiler.reset()  # the layers of other tests share its limit of recompilations
