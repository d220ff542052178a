import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from perp import adapters, parts
from perp.errors import UserError
from perp.linear import SparseLinear, swap_linears, unswap


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.final = nn.RMSNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.final(hidden))


NAMES = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
IDS = torch.arange(11)[None]


def pruned(
    layout: str = "dense", share: float = 0.5, dtype: torch.dtype = torch.float32
) -> tuple[Net, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    net = Net().to(dtype)
    masks = {name: torch.rand(net.get_submodule(name).weight.shape) >= share for name in NAMES}
    swap_linears(net, masks, layout)
    return net, masks


def train_a_little(net: Net) -> None:
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, SparseLinear):
            module.lora_B.data.normal_(std=0.1, generator=generator)


def test_attach_changes_nothing_and_draws_what_peft_draws() -> None:
    net, _ = pruned()
    logits = net(IDS)
    assert adapters.attach(net, r=4, alpha=12) == NAMES
    assert torch.equal(net(IDS), logits)
    for name in NAMES:
        sparse = net.get_submodule(name)
        assert sparse.scale == 3.0
        assert sparse.lora_A.shape == (4, sparse.in_features)
        assert sparse.lora_B.shape == (sparse.out_features, 4)
        assert not sparse.lora_B.any()
        bound = 1 / math.sqrt(sparse.in_features)  # gain sqrt(2 / (1 + 5)) times sqrt(3 / fan_in)
        assert sparse.lora_A.abs().max() <= bound
        assert sparse.lora_A.var().item() == pytest.approx(bound**2 / 3, rel=0.5)


def test_init_depends_on_the_seed_alone() -> None:
    def drawn(seed: int, noise: int) -> list[torch.Tensor]:
        net, _ = pruned()
        torch.manual_seed(noise)
        adapters.attach(net, r=4, seed=seed)
        return [net.get_submodule(name).lora_A.detach() for name in NAMES]

    assert all(map(torch.equal, drawn(3, 0), drawn(3, 1)))
    assert not any(map(torch.equal, drawn(3, 0), drawn(4, 0)))
    first, _, third, _ = drawn(3, 0)
    assert not torch.equal(first, third)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    net, _ = pruned()
    state = torch.get_rng_state()
    adapters.attach(net)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layout", ["dense", "bitmap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_keeps_every_zero_and_the_logits(layout: str, dtype: torch.dtype) -> None:
    net, masks = pruned(layout, dtype=dtype)
    adapters.attach(net, r=4, alpha=8)
    train_a_little(net)
    assert net.blocks[0].up.lora_A.dtype == torch.float32
    effective = {name: net.get_submodule(name).weight for name in NAMES}
    with_adapter = net(IDS).double()
    assert adapters.merge(net) == NAMES
    merged = net(IDS).double()
    assert all(net.get_submodule(name).mode is None for name in NAMES)
    assert not any("lora" in name for name, _ in net.named_parameters())
    # The adapter's weight is rounded once to the model's dtype, and so is the merged one: any difference is the last
    # bit of a weight or of a sum, which cannot exceed a few times the model's own rounding against float64.
    exact = net.double()(IDS)
    own_rounding = (merged - exact).abs().max()
    assert (merged - with_adapter).abs().max() <= 4 * own_rounding + 4 * torch.finfo(dtype).eps
    unswap(net)
    for name, mask in masks.items():
        weight = net.get_submodule(name).weight
        assert torch.equal(weight != 0, mask & (weight != 0))
        assert not torch.signbit(weight[~mask]).any()
        assert torch.equal(weight, effective[name].double())


def test_merge_is_fp32_per_element() -> None:
    """Sixteen terms, each 1/16 of the last bit of a bf16 1: together they count, one by one they would be lost."""
    linear = nn.Linear(8, 4, bias=False).to(torch.bfloat16)
    nn.init.ones_(linear.weight)
    sparse = SparseLinear.from_linear(linear, torch.ones(4, 8, dtype=torch.bool))
    adapters.attach(sparse, r=16, alpha=16)
    with torch.no_grad():
        sparse.lora_A.fill_(1.0)
        sparse.lora_B.fill_(2**-11)
    adapters.merge(sparse)
    assert torch.equal(sparse.weight, torch.full((4, 8), 1 + 2**-7, dtype=torch.bfloat16))


def test_kept_zeros_move_and_pruned_ones_do_not() -> None:
    linear = nn.Linear(8, 4)
    nn.init.zeros_(linear.weight)
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, ::2] = True
    sparse = SparseLinear.from_linear(linear, mask)
    adapters.attach(sparse, r=2)
    nn.init.ones_(sparse.lora_B)
    adapters.merge(sparse)
    assert torch.equal(sparse.weight != 0, mask)


def test_all_true_masks_are_plain_lora() -> None:
    """The dense comparison line: same function, same gradients, same merge as W + s B A on an nn.Linear."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 6).double()
    sparse = SparseLinear.from_linear(linear, torch.ones(6, 12, dtype=torch.bool))
    adapters.attach(sparse, r=3, alpha=6)
    nn.init.normal_(sparse.lora_B)
    parts.select_trainable(sparse, {"mask_lora"})
    x = torch.randn(5, 12, dtype=torch.float64)
    sparse(x).square().sum().backward()
    a, b = (p.detach().clone().requires_grad_(True) for p in (sparse.lora_A, sparse.lora_B))
    (F.linear(x, linear.weight.detach(), linear.bias.detach()) + 2 * (x @ a.T) @ b.T).square().sum().backward()
    torch.testing.assert_close(sparse.lora_A.grad, a.grad)
    torch.testing.assert_close(sparse.lora_B.grad, b.grad)
    adapters.merge(sparse)
    torch.testing.assert_close(sparse.weight, linear.weight.detach() + 2 * (b @ a).detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "chosen,expected",
    [
        ({"mask_lora"}, {f"{n}.lora_{k}" for n in NAMES for k in "AB"}),
        ({"kept"}, {f"{n}.values" for n in NAMES}),
        (
            {"norms"},
            {
                "blocks.0.norm.weight",
                "blocks.0.norm.bias",
                "blocks.1.norm.weight",
                "blocks.1.norm.bias",
                "final.weight",
            },
        ),
        ({"biases"}, {"blocks.0.norm.bias", "blocks.0.up.bias", "blocks.1.norm.bias", "blocks.1.up.bias"}),
        (
            {"biases", "norms"},
            {f"blocks.{i}.{n}" for i in (0, 1) for n in ("norm.weight", "norm.bias", "up.bias")} | {"final.weight"},
        ),
    ],
    ids=lambda value: "+".join(sorted(value)) if len(value) < 3 else "",
)
def test_select_trainable(chosen: set[str], expected: set[str]) -> None:
    net, _ = pruned()
    adapters.attach(net, r=2)
    selected = parts.select_trainable(net, chosen)
    names = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert names == expected
    assert len(selected) == len(expected)
    assert {id(p) for p in selected} == {id(p) for p in net.parameters() if p.requires_grad}
    parts.select_trainable(net, {"norms"})
    assert not net.blocks[0].up.lora_A.requires_grad


def test_adapters_are_fp32_again_after_a_cast() -> None:
    net, _ = pruned()
    adapters.attach(net, r=2)
    net.to(torch.bfloat16)
    parts.select_trainable(net, {"mask_lora"})
    assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}
    assert net.blocks[0].up.values.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["dense", "bitmap"])
def test_count_trainable(layout: str) -> None:
    dense_total = sum(p.numel() for p in Net().parameters())
    net, masks = pruned(layout)
    adapters.attach(net, r=2)
    parts.select_trainable(net, {"mask_lora"})
    assert parts.count_trainable(net) == (4 * 2 * (16 + 32), dense_total)
    parts.select_trainable(net, {"norms"})
    assert parts.count_trainable(net) == (2 * 32 + 16, dense_total)
    parts.select_trainable(net, {"kept"})
    assert parts.count_trainable(net) == (sum(int(mask.sum()) for mask in masks.values()), dense_total)


def test_refusals() -> None:
    net, _ = pruned()
    with pytest.raises(UserError, match="swap its pruned layers first"):
        adapters.attach(Net())
    with pytest.raises(UserError, match="not an adapter mode"):
        adapters.attach(net, mode="mask-lora")
    with pytest.raises(UserError, match="rank is 0"):
        adapters.attach(net, r=0)
    with pytest.raises(UserError, match="attach adapters first"):
        parts.select_trainable(net, {"mask_lora", "norms"})
    with pytest.raises(UserError, match="'bias' is not a part"):
        parts.select_trainable(net, {"bias"})
    with pytest.raises(UserError, match="swap its pruned layers first"):
        parts.select_trainable(Net(), {"kept"})
    with pytest.raises(UserError, match="nothing to train under biases"):
        parts.select_trainable(nn.Sequential(nn.Linear(2, 2, bias=False)), {"biases"})
    with pytest.raises(UserError, match="nothing is chosen to train"):
        parts.select_trainable(net, set())
    adapters.attach(net)
    with pytest.raises(UserError, match="already carries adapters"):
        adapters.attach(net)
    assert adapters.merge(Net()) == []
