from functools import partial

import pytest
import torch
from torch import nn

from perp.blocks import Calls, find_blocks, prunable, run_block
from perp.errors import UserError
from perp.statistics import collect
from tests.perp.families import FAMILIES, build, windows


def read_by_hooks(block, linears, calls):
    """What each linear reads over all windows, float64 [tokens, K], by hooks of the test's own."""
    read = {name: [] for name in linears}
    hooks = [
        linear.register_forward_hook(lambda _, args, out, name=name: read[name].append(args[0].double().flatten(0, -2)))
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        for window, hidden in enumerate(calls.hidden):
            run_block(block, hidden, calls.arguments(0, [window]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(tokens) for name, tokens in read.items()}


def first_block(model, ids):
    prefix, blocks = find_blocks(model)
    calls = Calls(model, ids)
    return blocks[0], prunable(blocks[0], f"{prefix}.0"), calls, partial(calls.arguments, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_what_the_linears_read(family, dtype):
    block, linears, calls, arguments = first_block(build(family, dtype=dtype), windows(3, 11))
    expected = read_by_hooks(block, linears, calls)
    norms = collect(block, linears, calls.hidden, arguments, "norms")
    grams = collect(block, linears, calls.hidden, arguments, "gram")
    assert list(norms) == list(grams) == list(linears)
    for name, x in expected.items():
        assert norms[name].tokens == grams[name].tokens == 33
        assert norms[name].sums.dtype == grams[name].sums.dtype == torch.float32
        gram = x.T @ x
        # 33 products of fp32 (exact for bf16 inputs) and their sum: each adds at most one rounding of the largest sum.
        bound = 33 * torch.finfo(torch.float32).eps * gram.abs().max()
        assert (grams[name].sums - gram).abs().max() <= bound
        assert (norms[name].square_sums - gram.diagonal()).abs().max() <= bound
        assert (grams[name].square_sums - gram.diagonal()).abs().max() <= bound


def test_linears_that_read_the_same_tensor_share_one_object():
    block, linears, calls, arguments = first_block(build("llama"), windows(2))
    found = {name.rpartition(".")[2]: s for name, s in collect(block, linears, calls.hidden, arguments, "gram").items()}
    assert found["q_proj"] is found["k_proj"] is found["v_proj"]
    assert found["gate_proj"] is found["up_proj"]
    assert len({id(statistics) for statistics in found.values()}) == 4


def test_repeats_bitwise_and_leaves_no_hook():
    block, linears, calls, arguments = first_block(build("qwen3"), windows(3))
    once = collect(block, linears, calls.hidden, arguments, "gram")
    again = collect(block, linears, calls.hidden, arguments, "gram")
    assert all(torch.equal(once[name].sums, again[name].sums) for name in linears)
    assert not any(module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["norms", "gram"])
def test_activations_that_are_not_finite_name_the_linear(kind, value):
    block, linears, calls, arguments = first_block(build("llama"), windows(2))
    with torch.no_grad():
        block.mlp.up_proj.weight[3, 3] = value
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.down_proj reads are NaN or infinite"):
        collect(block, linears, calls.hidden, arguments, kind)
    assert not any(module._forward_pre_hooks for module in block.modules())


class Experts(nn.Module):
    """The sign of a token's first number picks the first or the second of three experts."""

    def __init__(self):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(4, 6) for _ in range(3))
        self.gate = nn.ModuleList(nn.Linear(4, 6) for _ in range(3))

    def forward(self, hidden):
        out = torch.zeros_like(hidden)
        for expert, chosen in enumerate((hidden[..., 0] >= 0, hidden[..., 0] < 0)):
            if chosen.any():
                tokens = hidden[chosen]
                out[chosen] = (self.up[expert](tokens) * self.gate[expert](tokens))[..., :4]
        return out


def test_experts_count_their_own_tokens_and_an_unused_one_has_none():
    torch.manual_seed(0)
    block = Experts()
    positive, both = torch.rand(1, 5, 4), torch.randn(1, 40, 4)
    linears = prunable(block, "b")
    found = collect(block, linears, [positive, both], lambda ids: ((), {}), "norms")
    tokens = torch.cat([positive[0], both[0]]).double()
    for expert, chosen in enumerate((tokens[:, 0] >= 0, tokens[:, 0] < 0)):
        for name in ("up", "gate"):
            statistics = found[f"b.{name}.{expert}"]
            assert statistics.tokens == int(chosen.sum())
            torch.testing.assert_close(statistics.sums, tokens[chosen].square().sum(0).float())
    assert found["b.up.0"] is found["b.gate.0"]
    assert found["b.up.2"].tokens == 0
    assert not found["b.up.2"].sums.any()


def test_windows_held_out_are_summed_apart():
    block, linears, calls, arguments = first_block(build("llama"), windows(5, 9))
    whole = collect(block, linears, calls.hidden, arguments, "gram")
    found = collect(block, linears, calls.hidden, arguments, "gram", held_out=range(3, 5))
    first, last = (
        collect(block, linears, calls.hidden[part], lambda ids, at=part.start: arguments([i + at for i in ids]), "gram")
        for part in (slice(0, 3), slice(3, 5))
    )
    for name, statistics in found.items():
        assert (statistics.tokens, statistics.held_out.tokens) == (27, 18)
        assert torch.equal(statistics.sums, first[name].sums)
        assert torch.equal(statistics.held_out.sums, last[name].sums)
        assert statistics.pooled().tokens == 45
        torch.testing.assert_close(statistics.pooled().sums, whole[name].sums)
    assert len({id(statistics) for statistics in found.values()}) == 4
    assert all(statistics.held_out is None and statistics.pooled() is statistics for statistics in whole.values())
