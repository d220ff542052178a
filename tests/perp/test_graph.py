"""What the plan counts of graphs and logits, against what torch allocates and keeps when the model really runs."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from perp import distil, footprint, graph
from perp.blocks import Calls, find_blocks, run_block
from perp.experts import is_open, opened
from perp.loss import WindowLoss
from perp.workload import Shape, Work

from . import families


class Live(TorchDispatchMode):
    """The most bytes of new tensors alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.sizes = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = {place(one) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        output = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and place(tensor) not in given | self.sizes.keys():
                storage = tensor.untyped_storage()
                self.sizes[place(tensor)] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.freed, place(tensor))
        return output

    def freed(self, number):
        self.now -= self.sizes.pop(number, 0)


def place(tensor):
    return tensor.untyped_storage()._cdata


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_so_many_logits_are_alive_in_a_training_step(family, weight):
    vocabulary, ids = 6000, families.windows(1, 48)
    model = families.build(family, vocab_size=vocabulary).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    teacher = distil.Teacher(model, ids, weight=weight) if weight else None
    loss = WindowLoss(model, teacher)
    with Live() as live:
        loss(ids, 1.0, [0])
    shape = Shape(1, (), 0, 0, families.HIDDEN, vocabulary, 4, head_keeps=graph.of_head(model))
    assert shape.head_keeps == (family == "gemma2")
    planned = footprint.of_retraining(shape, Work(1, 47, taught=bool(weight)))
    assert live.most == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "bloom", "neox-parallel", "mixtral", "gpt-oss"])
def test_a_block_without_data_tells_what_one_with_data_keeps(family):
    kind, config = {**families.FAMILIES, **families.MIXTURES}[family]()
    config.max_position_embeddings = 256
    model = kind(config).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        bare = kind(config).eval()
        told = graph.of_block(bare, find_blocks(bare)[1][0])
    assert told is not None
    tokens = 96
    calls = Calls(model, families.windows(1, tokens))
    kept = {}

    def keep(tensor):
        kept[place(tensor)] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with opened(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_block(find_blocks(model)[1][0], calls.hidden[0].clone().requires_grad_(), calls.arguments(0, [0]))
    given = {place(one) for one in tree_leaves(calls.arguments(0, [0])) if isinstance(one, torch.Tensor)}
    own = {place(weight) for weight in model.parameters()} | given
    actual = sum(size for number, (size, _) in kept.items() if number not in own)
    assert told.kept.at(tokens, tokens) == pytest.approx(actual, rel=0.1)


def of_one(block):
    """What counts as a model of this block, which reads zeros [1, T, 16]."""

    class Model(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.block = block

        def get_decoder(self):
            return self

        def forward(self, input_ids, use_cache):
            return self.block(torch.zeros(1, input_ids.shape[1], 16))

    return Model()


def test_a_backward_pass_forms_what_it_is_told_to():
    """A sigmoid that multiplies what it read: two products of the gradient are alive beside the one to be returned."""

    class Block(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states * hidden_states.sigmoid() * 3

    model = of_one(Block())
    found = graph.of_block(model, model.block)
    state = 16 * 4
    # Kept: the input, of which the block is given a view, and the sigmoid. Formed: the gradient handed in, that of the
    # product, and the two that it becomes.
    assert found.formed.token == pytest.approx(4 * state)
    assert found.formed.pair == 0


def test_experts_count_the_same_in_every_dtype():
    """The library's product of closed experts is, without data, of bf16 alone."""
    _, config = families.MIXTURES["qwen2-moe"]()
    told = []
    for dtype in (torch.float32, torch.bfloat16):
        config.dtype = dtype
        with FakeTensorMode(allow_non_fake_inputs=True):
            bare = AutoModelForCausalLM.from_config(config)
            told.append(graph.of_block(bare, find_blocks(bare)[1][0]))
            assert not any(map(is_open, bare.modules()))
    assert told[0].formed.token == pytest.approx(2 * told[1].formed.token)
    # Norms and routers compute in fp32 in both.
    assert told[0].kept.token < 2 * told[1].kept.token < 1.2 * told[0].kept.token


def test_a_block_whose_shapes_depend_on_numbers_is_not_counted():
    class Block(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states + hidden_states[hidden_states > 0].sum()

    model = of_one(Block())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert graph.of_block(model, model.block) is None


def test_the_head_behind_experts_is_run_without_them():
    assert graph.of_head(families.build("mixtral")) == 0
