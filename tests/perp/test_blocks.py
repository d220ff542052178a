from collections import UserDict

import pytest
import torch
from torch import nn

from perp.blocks import Calls, all_prunable, find_blocks, is_norm, prunable, run_block
from perp.errors import UserError
from tests.perp.families import FAMILIES, build, windows


def hidden_states(model, ids):
    """The model's own record: the input of every block (the last entry, after the final norm, left out)."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[:-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_run_alone_as_in_the_model(family):
    model, ids = build(family), windows()
    _, blocks = find_blocks(model)
    calls = Calls(model, ids)
    expected = hidden_states(model, ids)
    assert torch.equal(torch.cat(calls.hidden), expected[0])
    with torch.no_grad():
        for index, (block, before) in enumerate(zip(blocks, expected, strict=True)):
            after = run_block(block, before, calls.arguments(index, range(4)))
            one = run_block(block, before[1:2], calls.arguments(index, [1]))
            torch.testing.assert_close(one, after[1:2])
            if index + 1 < len(blocks):
                assert torch.equal(after, expected[index + 1])


def test_arguments_differ_between_sliding_and_full_blocks():
    model, ids = build("gemma3", _attn_implementation="eager"), windows()
    calls = Calls(model, ids)
    masks = [calls.arguments(index, [0])[1]["attention_mask"] for index in range(4)]
    rotary = [calls.arguments(index, [0])[1]["position_embeddings"][0] for index in range(4)]
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(rotary[0], rotary[1])


def test_fixed_arguments_are_made_once_per_batch_size():
    calls = Calls(build("llama"), windows())
    assert calls.arguments(1, [0, 1]) is calls.arguments(1, [2, 3])
    assert calls.arguments(1, [0, 1]) is not calls.arguments(1, [0])


class Content(nn.Module):
    """Wraps a model so that its blocks get an argument that depends on the text."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("model", "_modules") else getattr(self.model, name)

    def forward(self, input_ids, **kwargs):
        mask = torch.ones_like(input_ids)
        mask[:, 0] = (input_ids[:, 0] % 2 == 0).long()
        return self.model(input_ids=input_ids, attention_mask=mask, **kwargs)


def test_arguments_that_depend_on_the_text_are_made_for_the_windows_asked():
    ids = windows(4)
    ids[:, 0] = torch.tensor([4, 5, 5, 4])
    model = Content(build("llama", _attn_implementation="eager"))
    calls = Calls(model, ids)
    masks = [calls.arguments(0, [window])[1]["attention_mask"] for window in range(4)]
    assert torch.equal(masks[0], masks[3])
    assert torch.equal(masks[1], masks[2])
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(calls.arguments(1, [3, 1])[1]["attention_mask"], torch.cat([masks[3], masks[1]]))


class TupleBlock(nn.Module):
    """A block that returns a tuple with the hidden state second and is called with it by keyword."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden_states, **kwargs):
        return None, self.block(hidden_states, **kwargs), "more"


def test_hidden_state_by_keyword_and_inside_a_tuple():
    plain, model, ids = build("llama"), build("llama"), windows()
    layers = model.model.layers
    for index, block in enumerate(layers):
        layers[index] = TupleBlock(block)

    def forward(input_ids, use_cache):
        hidden = model.model.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        rotary = model.model.rotary_emb(hidden, position_ids=positions)
        for block in layers:
            _, hidden, more = block(hidden_states=hidden, position_embeddings=rotary)
            assert more == "more"
        raise AssertionError("no forward may go past the last block")

    model.forward = forward
    calls = Calls(model, ids)
    hidden = torch.cat(calls.hidden)
    with torch.no_grad():
        for index, block in enumerate(layers):
            hidden = run_block(block, hidden, calls.arguments(index, range(4)))
        expected = plain.model.norm(hidden)
        assert torch.equal(plain.model(ids, use_cache=False).last_hidden_state, expected)


def test_no_cache_is_made_and_forwards_are_put_back():
    model = build("llama")
    model.config.use_cache = True
    calls = Calls(model, windows())
    args, kwargs = calls.arguments(0, [0])
    assert args == ()
    assert kwargs["past_key_values"] is None
    assert all("forward" not in block.__dict__ for block in find_blocks(model)[1])


def test_blocks_that_hand_on_more_than_the_hidden_state_are_refused():
    model = build("llama")
    layers = model.model.layers
    memory = []

    class Leaking(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, hidden, **kwargs):
            memory.append(hidden)
            return self.block(hidden + 0.1 * memory[0].shape[1] * len(memory), **kwargs)

    for index, block in enumerate(layers):
        layers[index] = Leaking(block)
    with pytest.raises(UserError, match="more than the hidden state"):
        Calls(model, windows())


def test_blocks_that_read_what_others_left_in_an_argument_are_refused():
    model = build("llama")
    layers = model.model.layers

    class Leaving(nn.Module):
        def __init__(self, block, index):
            super().__init__()
            self.block, self.index = block, index

        def forward(self, hidden, left, **kwargs):
            if self.index == 0:
                left["mean"] = hidden.mean()
            return self.block(hidden + left["mean"], **kwargs)

    for index, block in enumerate(layers):
        layers[index] = Leaving(block, index)

    def forward(input_ids, use_cache):
        hidden, left = model.model.embed_tokens(input_ids), UserDict()
        rotary = model.model.rotary_emb(hidden, position_ids=torch.arange(input_ids.shape[1])[None])
        for block in layers:
            hidden = block(hidden, left, position_embeddings=rotary)

    model.forward = forward
    with pytest.raises(UserError, match="more than the hidden state"):
        Calls(model, windows())


def test_activations_that_overflow_are_refused_as_such():
    model = build("llama", dtype=torch.float16)
    model.model.layers[0].mlp.down_proj.weight.data *= 1e5
    with pytest.raises(UserError, match=r"computes NaN or infinite activations as torch\.float16"):
        Calls(model, windows())


def test_a_model_that_skips_blocks_is_refused():
    model = build("llama")
    model.config.num_hidden_layers = 1
    with pytest.raises(UserError, match="runs 1 of its 2 blocks"):
        Calls(model, windows())


@pytest.mark.parametrize("shape", [(0, 8), (8,)])
def test_no_windows_are_refused(shape):
    with pytest.raises(UserError, match="at least one window"):
        Calls(build("llama"), torch.zeros(shape, dtype=torch.int64))


def test_find_blocks_prefers_the_list_with_most_parameters():
    name, blocks = find_blocks(build("opt"))
    assert name == "model.decoder.layers"
    assert len(blocks) == 2


def test_prunable_are_all_linears_and_only_those():
    model = build("qwen3")
    found = prunable(model.model.layers[1], "model.layers.1")
    attention = [f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"]
    assert list(found) == attention + [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert all(model.get_submodule(name) is linear for name, linear in found.items())
    assert list(all_prunable(model))[7:] == list(found)


def test_norms_are_told_by_behaviour():
    model = build("gemma3")
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if is_norm(module)}
    sandwich = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
    assert names == {"input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"} | sandwich
    assert is_norm(nn.LayerNorm(4, elementwise_affine=False))
    assert not is_norm(nn.Linear(4, 4))
