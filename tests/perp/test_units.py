import warnings

import pytest
import torch
from torch import nn

from perp.blocks import Calls, close, find_blocks, is_norm, prunable, run_block
from perp.errors import UserError
from perp.units import split, units
from tests.perp.families import FAMILIES, HIDDEN, build, windows
from tests.perp.tiny import model_dir

PARALLEL = ("neox-parallel", "phi")

# The norms of the first and of the second unit.
NORMS = {
    "opt": ({"self_attn_layer_norm"}, {"final_layer_norm"}),
    "opt-post-norm": (set(), {"self_attn_layer_norm", "final_layer_norm"}),
    "neox-parallel": ({"input_layernorm"}, {"post_attention_layernorm"}),
    "qwen3": ({"input_layernorm", "self_attn.q_norm", "self_attn.k_norm"}, {"post_attention_layernorm"}),
    "gemma2": (
        {"input_layernorm", "post_attention_layernorm"},
        {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
    ),
    "gemma3": (
        {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"},
        {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
    ),
    "phi": ({"input_layernorm"}, set()),
}
PLAIN = ({"input_layernorm"}, {"post_attention_layernorm"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_attention_and_mlp_with_their_norms(family, dtype):
    model, ids = build(family, dtype=dtype), windows(2, 20)
    prefix, blocks = find_blocks(model)
    calls = Calls(model, ids)
    hidden = torch.cat(calls.hidden)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for index, parts in units(model, ids):
            block, arguments = blocks[index], calls.arguments(index, [0, 1])
            first, second = parts
            assert all("attn" in name or "attention" in name for name in first.linears)
            assert all("mlp" in name or ".fc" in name for name in second.linears)
            assert {**first.linears, **second.linears} == prunable(block, f"{prefix}.{index}")
            assert (set(first.norm_names), set(second.norm_names)) == NORMS.get(family, PLAIN)
            output = run_block(block, hidden, arguments)
            middle = first(hidden, arguments)
            assert middle.shape == hidden.shape
            assert first.follows is False
            assert second.follows is (family not in PARALLEL)
            if second.follows:
                assert torch.equal(second(middle, arguments), output)
            else:
                composed = hidden + middle + second(hidden, arguments)
                assert close(composed, output)
            hidden = output


@pytest.mark.parametrize("family", ["llama", "opt", "opt-post-norm", "gemma3", "phi"])
def test_first_half_ends_before_the_second_runs(family):
    model, ids = build(family), windows(2)
    calls = Calls(model, ids)
    (_, (first, second)), *_ = units(model, ids)
    with torch.no_grad():
        before = first(calls.hidden[0], calls.arguments(0, [0]))
        for module in (*second.linears.values(), *(second.norms.values() if second.follows else ())):
            module.weight.fill_(float("nan"))
        assert torch.equal(first(calls.hidden[0], calls.arguments(0, [0])), before)


@pytest.mark.parametrize("family", ["llama", "opt", "opt-post-norm", "gemma3", "phi"])
def test_second_half_does_not_run_the_weights_of_the_first(family):
    model, ids = build(family), windows(2)
    calls = Calls(model, ids)
    (_, (first, second)), *_ = units(model, ids)
    with torch.no_grad():
        before = second(calls.hidden[0], calls.arguments(0, [0]))
        for module in first.linears.values():
            module.weight.fill_(float("nan"))
        assert torch.equal(second(calls.hidden[0], calls.arguments(0, [0])), before)


@pytest.mark.parametrize("family", ["llama", "opt", "neox-parallel"])
@pytest.mark.parametrize("granularity", ["block", "half-block"])
def test_tapped_is_the_output_of_the_unit(family, granularity):
    model, ids = build(family), windows(2)
    calls = Calls(model, ids)
    hidden, arguments = torch.cat(calls.hidden), calls.arguments(0, [0, 1])
    for unit in next(units(model, ids, granularity))[1]:
        if unit.follows:
            continue
        seen = []
        with torch.no_grad(), unit.tapped(seen.append, hidden.shape):
            run_block(unit.block, hidden, arguments)
        run_block(unit.block, hidden, arguments)
        assert len(seen) == 1
        assert torch.equal(seen[0], unit(hidden, arguments))


def test_gradients_reach_the_unit_and_nothing_else():
    model, ids = build("llama"), windows(2)
    calls = Calls(model, ids)
    _, (first, second) = next(units(model, ids))
    for unit, other in ((first, second), (second, first)):
        model.zero_grad()
        unit(calls.hidden[0], calls.arguments(0, [0])).square().mean().backward()
        assert all(module.weight.grad.abs().sum() > 0 for module in (*unit.linears.values(), *unit.norms.values()))
        assert all(module.weight.grad is None for module in other.linears.values())


def test_names_follow_a_swap_of_the_modules():
    model = build("llama")
    _, (first, _) = next(units(model))
    replaced = nn.Linear(HIDDEN, HIDDEN, bias=False)
    model.model.layers[0].self_attn.q_proj = replaced
    assert first.linears["model.layers.0.self_attn.q_proj"] is replaced


def test_whole_blocks_are_one_unit():
    model, ids = build("llama"), windows(2)
    calls = Calls(model, ids)
    for index, (unit,) in units(model, ids, "block"):
        block = model.model.layers[index]
        assert unit.name == f"model.layers.{index}"
        assert unit.linears == prunable(block, unit.name)
        assert set(unit.norms.values()) == {module for module in block.modules() if is_norm(module)}
        with torch.no_grad():
            arguments = calls.arguments(index, [0])
            assert torch.equal(unit(calls.hidden[0], arguments), run_block(block, calls.hidden[0], arguments))


def test_walks_a_directory(tmp_path):
    directory = model_dir(tmp_path, "qwen3")
    found = {unit.name: unit.linear_names for _, parts in units(directory) for unit in parts}
    assert found == {unit.name: unit.linear_names for _, parts in units(build("qwen3")) for unit in parts}
    assert len(found) == 4


def test_unknown_granularity_is_refused():
    with pytest.raises(UserError, match="choose block or half-block"):
        next(units(build("llama"), granularity="layer"))


class Toy(nn.Module):
    """Blocks of the shapes that no family above has; tokens are mixed by a cumulative mean."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.norm, self.other_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.mix = Mix()
        self.up, self.down = nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN)

    def forward(self, x):
        def mlp(h):
            return self.down(torch.relu(self.up(h)))

        if self.shape == "loose":  # parallel, one branch written out in the block
            return x + self.mix(self.norm(x))[0] + mlp(self.norm(x))
        if self.shape == "normed stream":  # the second half reads a stream that is not what it adds to
            return self.norm(x) + mlp(self.other_norm(self.mix(self.norm(x))[0] + x))
        if self.shape == "plain":
            h = x + self.mix(self.norm(x))[0]
            return h + mlp(self.other_norm(h))
        if self.shape == "biased":  # a norm with a bias after attention: of zeros it is not zero
            h = x + self.norm(self.mix(x)[0])
            return h + mlp(self.other_norm(h))
        raise AssertionError(self.shape)


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        counts = torch.arange(1, x.shape[1] + 1)[:, None]
        return self.proj(x).cumsum(1) / counts, None


def toy(shape):
    torch.manual_seed(0)
    block = Toy(shape)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return block, torch.randn(1, 13, HIDDEN)


@pytest.mark.parametrize("shape", ["loose", "normed stream"])
def test_blocks_that_cannot_be_cut_stay_whole(shape):
    block, probe = toy(shape)
    (unit,) = split(block, "b", probe, ((), {}))
    assert unit.linear_names == ("mix.proj", "up", "down")
    assert unit.end is None


@pytest.mark.parametrize("first", [0.0, 1.0, -3.0])
def test_a_first_token_that_its_norm_makes_zeros_of_is_no_matter(first):
    block, probe = toy("plain")
    probe[:, 0] = first
    assert [unit.linear_names for unit in split(block, "b", probe, ((), {}))] == [("mix.proj",), ("up", "down")]


def test_a_norm_after_attention_is_silenced_with_it():
    block, probe = toy("biased")
    first, second = split(block, "b", probe, ((), {}))
    assert (first.norm_names, second.norm_names) == (("norm",), ("other_norm",))
    hidden = torch.randn(3, 5, HIDDEN)
    assert torch.equal(second(first(hidden, ((), {})), ((), {})), block(hidden))


def test_one_warning_where_blocks_stay_whole():
    model = build("llama")

    def unsplit(block):
        run = block.forward
        block.forward = lambda hidden, **kwargs: run(hidden, **kwargs) + 0.5 * hidden

    for block in model.model.layers:
        unsplit(block)
    with pytest.warns(UserWarning, match="cannot be cut") as caught:
        found = list(units(model))
    assert len(caught) == 1
    assert [len(parts) for _, parts in found] == [1, 1]
