"""What torch asks of an op, where Triton serves it: its schema holds, and it compiles without a break."""

import pytest
import torch
from torch import Tensor, nn

import perp_kernels as pk
from tests.perp_kernels.oracles import DEVICE, normal, random_weight
from tests.perp_kernels.test_registration import OFFSETS, Layer, calls

OPS = {
    "add_lowrank_",
    "gram_",
    "masked_lora_linear",
    "masked_lora_linear_backward",
    "mul_lowrank_",
    "scale_lora_linear",
    "scale_lora_linear_backward",
    "select",
    "sparse_linear",
    "sparse_linear_backward",
    "sparsegpt_block_",
    "unpack",
}


@pytest.mark.parametrize("layout,experts", [("bitmap", 3), ("semi24", None)])
def test_opcheck(layout: str, experts: int | None) -> None:
    checked = set()
    for name, arguments in calls(layout, experts):
        if name in OPS:
            here = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments]
            with pk.backend("triton"):
                # The trace of an op is the same whoever serves it: tests/perp_kernels/test_registration.py has it.
                utilities = ("test_schema", "test_faketensor")
                torch.library.opcheck(getattr(torch.ops.perp_kernels, name).default, here, test_utils=utilities)
            checked.add(name)
    assert checked == OPS


@pytest.mark.parametrize("mode", ["frozen", "values", "mask_lora", "scale_lora"])
@pytest.mark.parametrize("experts", [None, 3])
def test_compiles_without_a_break(mode: str, experts: int | None) -> None:
    torch.compiler.reset()
    shape = (6, 12) if experts is None else (experts, 6, 12)
    layer = Layer(random_weight(shape, "bitmap")[2], mode)
    offsets = None if experts is None else OFFSETS.to(DEVICE)
    x = normal(5, 12).requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def run(module: nn.Module) -> list[Tensor | None]:
        y = module(x, offsets)
        return [y, *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)]

    with pk.backend("triton"):
        expected, got = run(layer), run(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    for one, other in zip(expected, got, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one, other)
