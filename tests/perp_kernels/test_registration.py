"""What torch asks of an op: its schema, its fake, and a trace without breaks, whatever the layout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import perp_kernels as pk

from .oracles import normal, random_mask, random_weight

CASES = [("dense", None), ("bitmap", 3), ("semi24", None)]
OFFSETS = torch.tensor([2, 2, 5])


def calls(layout: str, experts: int | None) -> Iterator[tuple[str, tuple[object, ...]]]:
    """(name of the op, arguments) for each op on a weight of this layout."""
    leading = () if experts is None else (experts,)
    shape, offsets = [*leading, 6, 12], None if experts is None else OFFSETS
    _, mask, w = random_weight(tuple(shape), layout)
    weight = (w.values, w.index, w.row_ptr, layout, shape)
    x, A, B, bias = normal(5, 12), normal(*leading, 3, 12), normal(*leading, 6, 3), normal(*leading, 6)
    grad_y = normal(5, 6)
    yield "unpack", (w.values, w.index, w.row_ptr, 12, layout)
    yield "unpack_mask", (w.index, 12, layout)
    yield "pack_bits", (mask,)
    yield "sparse_linear", (x, *weight, bias, offsets)
    yield "masked_lora_linear", (x, *weight, A, B, 2.0, bias, offsets)
    yield "scale_lora_linear", (x, *weight, A, B, bias, offsets)
    for needs in ([True] * 3, [True, False, False]):
        yield "sparse_linear_backward", (grad_y, x if needs[1] else None, *weight, offsets, needs)
    for needs in ([True] * 4, [True, False, False, False]):
        saved = x if needs[1] else None
        yield "masked_lora_linear_backward", (grad_y, saved, *weight, A, B, 2.0, offsets, needs)
        yield "scale_lora_linear_backward", (grad_y, saved, *weight, A, B, offsets, needs)
    yield "add_lowrank_", (*weight, A, B, 2.0)
    yield "mul_lowrank_", (*weight, A, B)
    yield "select", (normal(*shape), "0.5")
    yield "gram_", (torch.zeros(*leading, 12, 12), x, offsets)
    yield "wanda_select", (normal(6, 12), normal(12).abs(), "2:4")
    yield (
        "masked_refit",
        (normal(*shape), random_mask(tuple(shape), "bitmap"), torch.eye(12).expand(*leading, 12, 12), 0.01),
    )
    for pattern in ("0.5", "2:4"):
        yield "swap_round_", (normal(6, 12), random_mask((6, 12), "semi24"), normal(6, 12), torch.eye(12), pattern)
    block = normal(6, 12), torch.eye(12), "2:4", torch.empty(6, 12), torch.empty(6, 12, dtype=torch.bool)
    yield "sparsegpt_block_", block
    yield "sparsegpt", (normal(*shape), torch.eye(12).expand(*leading, 12, 12).contiguous(), "2:4", 0.01, 8)


@pytest.mark.parametrize("layout,experts", CASES)
def test_opcheck(layout: str, experts: int | None) -> None:
    names = set()
    for name, arguments in calls(layout, experts):
        torch.library.opcheck(getattr(torch.ops.perp_kernels, name).default, arguments)
        names.add(name)
    assert names == set(pk.active()) - {"pack"}, "an op is registered that no call here checks"


class Layer(nn.Module):
    """A layer as a framework writes it: Parameters for the components, a SparseWeight built over them in forward."""

    def __init__(self, w: pk.SparseWeight, mode: str) -> None:
        super().__init__()
        *experts, N, K = w.shape
        self.values = nn.Parameter(w.values, requires_grad=mode == "values")
        self.index = nn.Parameter(w.index, requires_grad=False)
        self.row_ptr = None if w.row_ptr is None else nn.Parameter(w.row_ptr, requires_grad=False)
        self.shape, self.layout, self.mode = w.shape, w.layout, mode
        self.A, self.B = nn.Parameter(normal(*experts, 3, K)), nn.Parameter(normal(*experts, N, 3))
        self.bias = nn.Parameter(normal(*experts, N))

    def forward(self, x: Tensor, offsets: Tensor | None) -> Tensor:
        w = pk.SparseWeight(self.values, self.index, self.row_ptr, self.shape, self.layout)
        if self.mode == "mask_lora":
            return pk.masked_lora_linear(x, w, self.A, self.B, 2.0, self.bias, offsets)
        if self.mode == "scale_lora":
            return pk.scale_lora_linear(x, w, self.A, self.B, self.bias, offsets)
        return pk.sparse_linear(x, w, self.bias, offsets)


@pytest.mark.parametrize("mode", ["frozen", "values", "mask_lora", "scale_lora"])
@pytest.mark.parametrize("layout,experts", CASES)
def test_compiles_without_a_break(mode: str, layout: str, experts: int | None) -> None:
    torch.compiler.reset()
    shape = (6, 12) if experts is None else (experts, 6, 12)
    layer = Layer(random_weight(shape, layout)[2], mode)
    offsets = None if experts is None else OFFSETS
    x = normal(5, 12).requires_grad_()
    leaves = [x, *(p for name, p in layer.named_parameters() if p.requires_grad)]

    def run(module: nn.Module) -> list[Tensor | None]:
        y = module(x, offsets)
        return [y, *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)]

    for expected, got in zip(run(layer), run(torch.compile(layer, fullgraph=True, backend="aot_eager")), strict=True):
        assert (expected is None) == (got is None)
        if expected is not None:
            assert torch.equal(expected, got)


def test_one_graph_serves_all_token_counts_and_obeys_the_override() -> None:
    torch.compiler.reset()
    layer = Layer(random_weight((6, 12), "bitmap")[2], "mask_lora")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9):
        x = normal(2, tokens, 12)
        assert torch.equal(compiled(x, None), layer(x, None))
    with pk.dispatch.served() as record, pk.backend("reference"):
        compiled(normal(2, 7, 12), None)
    assert record == {("masked_lora_linear", "reference")}


def test_the_rest_of_the_package_traces() -> None:
    torch.compiler.reset()
    _, mask, w = random_weight((6, 12), "bitmap")

    def everything(w_values: Tensor, scores: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        packed = pk.SparseWeight(w_values, w.index, w.row_ptr, w.shape, w.layout)
        H = pk.gram_(torch.zeros(12, 12), x)
        new, new_mask = pk.sparsegpt(packed.unpack(), H, "2:4")
        return new, new_mask, packed.mask(), pk.select(scores, "0.5"), pk.unpack_bits(pk.pack_bits(mask), 12)

    arguments = (w.values, normal(6, 12), normal(40, 12))
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for expected, got in zip(everything(*arguments), compiled(*arguments), strict=True):
        assert torch.equal(expected, got)
