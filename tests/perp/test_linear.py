import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import perp
import perp_kernels as pk
from perp import adapters
from perp.errors import UserError
from perp.linear import SparseLinear, swap_linears, unswap

LAYOUTS = ("dense", "bitmap", "semi24")


def two_of_four(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(rows, columns // 4, 4, generator=torch.Generator().manual_seed(seed))
    return (scores.argsort(-1) < 2).reshape(rows, columns)


def layer(
    layout: str, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[nn.Linear, torch.Tensor, SparseLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(24, 10, bias=bias).to(dtype)
    mask = two_of_four(10, 24)
    with torch.no_grad():  # a kept weight that is exactly zero must stay in the mask
        linear.weight[0, mask[0].nonzero()[0, 0]] = 0
    return linear, mask, SparseLinear.from_linear(linear, mask, layout)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)) for _ in range(3)
        )
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for block in self.layers:
            hidden = hidden + block(hidden)
        return self.head(hidden)


def masks_of(net: Net) -> dict[str, torch.Tensor]:
    return {
        name: two_of_four(*linear.weight.shape, seed=index)
        for index, (name, linear) in enumerate(net.named_modules())
        if isinstance(linear, nn.Linear) and name != "head"
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_masked_linear(layout: str, dtype: torch.dtype, bias: bool) -> None:
    linear, mask, sparse = layer(layout, dtype, bias)
    x = torch.randn(2, 3, 24, dtype=dtype)
    weight = linear.weight.detach() * mask
    exact = F.linear(x.double(), weight.double(), None if linear.bias is None else linear.bias.double())
    plain = (F.linear(x, weight, linear.bias) - exact).abs().max()
    assert (sparse(x) - exact).abs().max() <= 2 * plain + torch.finfo(dtype).eps
    assert sparse(x).dtype == dtype
    assert sparse(x[:0]).shape == (0, 3, 10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_to_linear_is_exact(layout: str) -> None:
    linear, mask, sparse = layer(layout)
    back = sparse.to_linear()
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, linear.weight.masked_fill(~mask, 0))
    assert not torch.signbit(back.weight[~mask]).any()
    assert back.bias is linear.bias
    assert torch.equal(sparse.sparse_weight.mask(), mask)


def test_reads_like_linear() -> None:
    linear, mask, sparse = layer("bitmap")
    assert (sparse.in_features, sparse.out_features) == (24, 10)
    assert torch.equal(sparse.weight, linear.weight * mask)
    assert sparse.bias is linear.bias
    assert sparse.weight.dtype == linear.weight.dtype
    assert "in_features=24" in repr(sparse)
    sparse.weight.zero_()
    assert torch.equal(sparse.weight, linear.weight * mask)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_shows_the_adapter_and_changes_nothing(layout: str) -> None:
    linear, mask, sparse = layer(layout)
    adapters.attach(sparse, r=4, alpha=8)
    with torch.no_grad():
        sparse.lora_B.normal_()
    before = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    expected = linear.weight + 2 * mask * (sparse.lora_B @ sparse.lora_A)
    torch.testing.assert_close(sparse.weight, expected * mask)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sparse.state_dict().items())


def test_forward_hooks_fire() -> None:
    _, _, sparse = layer("dense")
    seen: list[tuple[int, ...]] = []
    sparse.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    sparse.register_forward_hook(lambda module, args, output: output * 0)
    assert not sparse(torch.randn(5, 24)).any()
    assert seen == [(5, 24)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_components_are_frozen_parameters_with_rows_first(layout: str) -> None:
    _, mask, sparse = layer(layout)
    frozen = {name: parameter for name, parameter in sparse.named_parameters() if name != "bias"}
    assert set(frozen) == {"values", "index"}
    assert all(parameter.shape[0] == 10 and not parameter.requires_grad for parameter in frozen.values())
    ragged = mask.clone()
    ragged[3] = False
    names = set(dict(SparseLinear.from_linear(nn.Linear(24, 10), ragged, "bitmap").named_parameters()))
    assert names == {"values", "index", "row_ptr", "bias"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cast_moves_values_and_never_the_index(layout: str) -> None:
    linear, mask, sparse = layer(layout)
    sparse.to(torch.bfloat16)
    assert sparse.values.dtype == sparse.bias.dtype == torch.bfloat16
    assert sparse.index.dtype == torch.uint8
    assert torch.equal(sparse.to_linear().weight, (linear.weight * mask).bfloat16())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deepcopy_and_state_dict(layout: str) -> None:
    _, mask, sparse = layer(layout)
    adapters.attach(sparse, r=3)
    twin = copy.deepcopy(sparse)
    with torch.no_grad():
        twin.values.mul_(2)
        twin.lora_B.normal_()
    assert not torch.equal(twin.weight, sparse.weight)
    sparse.load_state_dict(twin.state_dict())
    assert torch.equal(twin.weight, sparse.weight)
    assert torch.equal(sparse.sparse_weight.mask(), mask)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_kept_weights_get_a_gradient(layout: str) -> None:
    linear, mask, sparse = layer(layout, torch.float64)
    sparse.values.requires_grad_(True)
    x = torch.randn(7, 24, dtype=torch.float64)
    sparse(x).square().sum().backward()
    weight = (linear.weight.detach() * mask).requires_grad_(True)
    F.linear(x, weight, linear.bias).square().sum().backward()
    gradient = pk.SparseWeight(
        values=sparse.values.grad, index=sparse.index, row_ptr=sparse.row_ptr, shape=(10, 24), layout=layout
    ).unpack()
    torch.testing.assert_close(gradient, weight.grad * mask)
    assert sparse.index.grad is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("adapter", [False, True])
def test_compiles_without_graph_breaks(layout: str, adapter: bool) -> None:
    _, _, sparse = layer(layout)
    if adapter:
        adapters.attach(sparse, r=4)
        nn.init.normal_(sparse.lora_B)
    x = torch.randn(6, 24)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), sparse(x))
    sparse.bias.grad = None
    compiled(x).sum().backward()
    torch.testing.assert_close(sparse.bias.grad, torch.full((10,), 6.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_swap_and_unswap(layout: str) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    masks = masks_of(net)
    with torch.no_grad():
        for name, mask in masks.items():
            net.get_submodule(name).weight.mul_(mask)
    ids = torch.arange(11)[None]
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    logits = net(ids)
    assert swap_linears(net, masks, layout) == list(masks)
    assert all(isinstance(net.get_submodule(name), SparseLinear) for name in masks)
    assert net.head.weight is net.embed.weight
    assert not any(module.training for module in net.modules())
    torch.testing.assert_close(net(ids), logits)
    assert unswap(net) == list(masks)
    assert list(net.state_dict()) == list(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(net(ids), logits)


def tensor_bytes() -> int:
    """Bytes of every storage that a Python tensor anywhere in this process holds."""
    gc.collect()
    alive = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    return sum(storages.values())


@pytest.mark.parametrize("layout,bits", [("dense", 33), ("bitmap", 17), ("semi24", 17)])
def test_no_dense_copy_hides_in_the_swapped_model(layout: str, bits: int) -> None:
    """Everything alive, hidden references included: fp32 values (all, or the kept half) and one bit per weight."""
    before = tensor_bytes()
    net = Net()
    masks = masks_of(net)
    rest = sum(p.nbytes for n, p in net.named_parameters() if not any(n == f"{m}.weight" for m in masks))
    swap_linears(net, masks, layout)
    count = sum(mask.numel() for mask in masks.values())
    del masks
    assert tensor_bytes() - before == rest + count * bits // 8
    assert sum(p.nbytes for p in net.parameters()) == rest + count * bits // 8


def test_bad_masks_are_refused_before_anything_is_replaced() -> None:
    net = Net()
    good = masks_of(net)
    cases = {
        "no.such": ({"no.such": good["layers.0.0"]}, "not an nn.Linear"),
        "norm": ({"layers.0.1": good["layers.0.0"]}, "not an nn.Linear"),
        "shape": ({"layers.0.0": good["layers.0.0"].T}, r"must be bool \[32, 16\]"),
        "dtype": ({"layers.0.0": good["layers.0.0"].float()}, "must be bool"),
        "tied": ({"head": torch.ones(11, 16, dtype=torch.bool)}, "tied"),
    }
    for bad, message in cases.values():
        with pytest.raises(UserError, match=message):
            swap_linears(net, {**good, **bad})
        assert not any(isinstance(module, SparseLinear) for module in net.modules())


def test_a_layer_in_two_places_is_refused() -> None:
    net = Net()
    net.layers[2][0] = net.layers[1][0]
    with pytest.raises(UserError, match=r"layers\.1\.0 is tied to another module"):
        swap_linears(net, {"layers.1.0": torch.ones(32, 16, dtype=torch.bool)})


def test_unswap_refuses_unmerged_adapters() -> None:
    net = Net()
    swap_linears(net, masks_of(net))
    adapters.attach(net.layers[1], r=2)
    with pytest.raises(UserError, match=r"layers\.1\.0 still carries its mask_lora adapter"):
        unswap(net)
    assert isinstance(net.layers[0][0], SparseLinear)


def two_to_four(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, SparseLinear]:
    torch.manual_seed(0)
    linear, mask = nn.Linear(64, 70).to(dtype), two_of_four(70, 64)
    return torch.where(mask, linear.weight.detach(), 0), SparseLinear.from_linear(linear, mask, "semi24")


def test_a_prepared_layer_computes_saves_and_unswaps_as_before():
    weight, sparse = two_to_four()
    x, saved = torch.randn(3, 64).bfloat16(), copy.deepcopy(sparse.state_dict())
    expected = sparse(x)
    sparse.prepare_()
    assert sparse.layout == pk.TILED24
    assert sparse.values.shape == (128, 32)
    assert torch.equal(sparse(x), expected)
    assert torch.equal(sparse.to_linear().weight, weight)
    for name, tensor in sparse.state_dict().items():
        assert torch.equal(tensor, saved[name])
    assert torch.equal(copy.deepcopy(sparse)(x), expected)
    sparse.restore_()
    assert sparse.layout == "semi24"
    assert torch.equal(sparse.values, saved["values"])


def test_a_prepared_layer_takes_a_canonical_state():
    _, sparse = two_to_four()
    other = copy.deepcopy(sparse).prepare_()
    with torch.no_grad():
        other.values.fill_(3.0)
    state = sparse.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    other.load_state_dict(state)
    assert torch.equal(other.weight, sparse.weight)
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())


def test_prepare_takes_the_layers_that_have_the_order():
    model = nn.ModuleDict(
        {"fits": two_to_four()[1], "wide": two_to_four(torch.float32)[1], "other": layer("bitmap")[2]}
    )
    model["short"] = layer("semi24", torch.bfloat16)[2]  # 24 inputs
    assert perp.prepare(model) == ["fits"]
    assert [model[name].layout for name in model] == [pk.TILED24, "semi24", "bitmap", "semi24"]
    assert perp.prepare(model) == []


def test_adapters_train_beside_a_prepared_weight():
    _, sparse = two_to_four()
    x = torch.randn(5, 64).bfloat16()
    results = []
    for one in (copy.deepcopy(sparse), sparse.prepare_()):
        torch.manual_seed(1)
        net = nn.Sequential(one)
        adapters.attach(net, r=4)
        with torch.no_grad():
            one.lora_B.normal_()
        y = net(x)
        y.sum().backward()
        gradient = one.lora_A.grad
        adapters.merge(net)
        results.append([y, gradient, one.weight])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
