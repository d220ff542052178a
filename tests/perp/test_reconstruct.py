import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from perp.blocks import Calls
from perp.errors import UserError
from perp.reconstruct import Losses, ReconstructSettings, reconstruct
from perp.units import units
from tests.perp.families import build, windows

KEPT_AND_NORMS = ("kept", "norms")


class Case:
    """The first block's `which`-th unit, pruned to half by magnitude, its inputs and its dense outputs."""

    def __init__(self, family="llama", which=0, dtype=torch.float32, granularity="half-block", count=6):
        self.model = build(family, dtype=dtype)
        calls = Calls(self.model, windows(count, 16))
        self.unit = next(units(self.model, granularity=granularity))[1][which]
        self.inputs, self.arguments = calls.hidden, partial(calls.arguments, 0)
        self.targets = self.outputs()
        self.masks = {}
        for name, linear in self.unit.linears.items():
            mask = linear.weight.abs() > linear.weight.abs().median()
            linear.weight.data.masked_fill_(~mask, 0)
            self.masks[name] = mask
        self.start = copy.deepcopy(self.model.state_dict())

    @torch.no_grad()
    def outputs(self):
        return [self.unit(hidden, self.arguments([i])) for i, hidden in enumerate(self.inputs)]

    def fit(self, **settings) -> Losses:
        self.wanted = [target.clone() for target in self.targets]
        settings = {"parts": KEPT_AND_NORMS, "lr": 1e-2} | settings
        return reconstruct(
            self.unit, self.masks, self.inputs, self.targets, self.arguments, ReconstructSettings(**settings)
        )

    def loss(self):
        pairs = zip(self.outputs(), self.wanted, strict=True)
        return sum((a.double() - b.double()).square().mean().item() for a, b in pairs) / len(self.inputs)

    def changed(self):
        now = self.model.state_dict()
        assert list(now) == list(self.start)
        return {name for name, value in self.start.items() if not torch.equal(now[name], value)}

    def named(self, *kinds):
        """The unit's own parameters of these kinds, as the state dict names them."""
        found = set()
        for kind in kinds:
            if kind in ("kept", "mask_lora"):
                found |= {f"{name}.weight" for name in self.unit.linears}
            if kind == "norms":
                found |= {
                    f"{name}.{own}" for name, norm in self.unit.norms.items() for own, _ in norm.named_parameters()
                }
            if kind == "biases":
                modules = {**self.unit.linears, **self.unit.norms}
                found |= {f"{name}.bias" for name, m in modules.items() if getattr(m, "bias", None) is not None}
        return found


@pytest.mark.parametrize("parts", [("kept",), KEPT_AND_NORMS, ("mask_lora", "biases"), ("norms",), ("biases",)])
@pytest.mark.parametrize("which", [0, 1])
def test_the_chosen_parts_of_the_unit_train_and_nothing_else(which, parts):
    case = Case("opt", which)
    losses = case.fit(parts=parts)
    assert losses.after < losses.before
    assert case.changed() == case.named(*parts)
    for name, mask in case.masks.items():
        linear = case.model.get_submodule(name)
        assert type(linear) is nn.Linear
        assert torch.equal(linear.weight[~mask], torch.zeros(int((~mask).sum())))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in case.model.parameters())


@pytest.mark.parametrize("family, which", [("llama", 0), ("llama", 1), ("phi", 0), ("phi", 1), ("gemma3", 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_those_of_all_windows_and_targets_become_the_outputs(family, which, dtype):
    case = Case(family, which, dtype)
    case.wanted = case.targets
    before = case.loss()
    losses = case.fit()
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    assert losses.before == pytest.approx(before, rel=rounding)
    assert losses.after == pytest.approx(case.loss(), rel=rounding)
    assert losses.after < 0.8 * losses.before
    assert not losses.restored
    assert all(torch.equal(*pair) for pair in zip(case.targets, case.outputs(), strict=True))
    assert {value.dtype for value in case.model.state_dict().values()} == {dtype}


def test_kept_weights_train_as_plain_adamw_on_masked_gradients_would():
    case = Case("llama", 1, count=5)
    plain = Case("llama", 1, count=5)
    case.fit(epochs=2, batch=2, warmup=0.4, lr=3e-3, seed=5)
    parameters = [m.weight for m in (*plain.unit.linears.values(), *plain.unit.norms.values())]
    masks = [plain.masks.get(name, torch.ones(())) for name in (*plain.unit.linears, *plain.unit.norms)]
    adam = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)
    # Six steps of 5 windows in pairs; two of them, 40 %, warm up.
    rates = [3e-3 / 3, 3e-3 * 2 / 3, 3e-3, 3e-3 * 3 / 4, 3e-3 * 2 / 4, 3e-3 / 4]
    generator = torch.Generator().manual_seed(5)
    batches = [ids for _ in range(2) for ids in torch.randperm(5, generator=generator).split(2)]
    for rate, ids in zip(rates, batches, strict=True):
        adam.param_groups[0]["lr"] = rate
        hidden, target = (torch.cat([found[i] for i in ids]) for found in (plain.inputs, plain.targets))
        adam.zero_grad()
        (plain.unit(hidden, plain.arguments(ids.tolist())) - target).square().mean().backward()
        for parameter, mask in zip(parameters, masks, strict=True):
            parameter.grad *= mask
        adam.step()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(case.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [KEPT_AND_NORMS, ("mask_lora", "norms")])
def test_repeats_bitwise_and_follows_its_seed(parts):
    states = []
    for seed in (1, 1, 2):
        case = Case("qwen3")
        case.fit(parts=parts, seed=seed)
        states.append(case.model.state_dict())
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("lr", [30.0, 1e30])
@pytest.mark.parametrize("parts", [KEPT_AND_NORMS, ("mask_lora", "norms")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_fit_that_makes_it_worse_is_undone(parts, lr, dtype):
    case = Case("llama", 1, dtype)
    losses = case.fit(parts=parts, lr=lr)
    assert losses.restored
    assert losses.after == losses.before
    assert case.changed() == set()
    assert all(torch.equal(*pair) for pair in zip(case.targets, case.outputs(), strict=True))


def test_a_unit_without_the_parts_is_left_as_it_was():
    case = Case("phi", 1)
    losses = case.fit(parts=("norms",))
    assert losses.after == losses.before
    assert not losses.restored
    assert case.changed() == set()


def test_one_window_and_a_batch_beyond_it():
    losses = Case(count=1).fit(batch=4)
    assert losses.after < losses.before


def test_whole_blocks():
    case = Case("gemma3", granularity="block")
    assert case.fit(parts=("mask_lora", "norms")).after < 0.8 * case.loss() + 1
    assert case.changed() == case.named("mask_lora", "norms")


def test_frozen_parameters_stay_frozen():
    case = Case()
    case.model.requires_grad_(False)
    case.fit()
    assert not any(parameter.requires_grad for parameter in case.model.parameters())


def test_an_interrupt_leaves_ordinary_linears():
    case = Case()
    plain = case.arguments

    def interrupted(ids):
        if len(ids) > 1:
            raise KeyboardInterrupt
        return plain(ids)

    case.arguments = interrupted
    with pytest.raises(KeyboardInterrupt):
        case.fit(parts=("mask_lora",))
    assert case.changed() == set()
    assert all(type(linear) is nn.Linear for linear in case.unit.linears.values())


def test_an_output_that_is_not_finite_names_the_unit():
    case = Case()
    case.inputs[2][0, 0, 0] = math.inf
    with pytest.raises(UserError, match=r"the output of model\.layers\.0 \(first half\) is NaN or infinite"):
        case.fit()
    assert case.changed() == set()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"parts": ("weights",)}, "'weights' is not a part"),
        ({"parts": ()}, "nothing is chosen"),
        ({"parts": ("lora",)}, "'lora' is not a part that can be trained here"),
        ({"parts": ("kept", "head")}, "'head' is not a part that can be trained here"),
        ({"parts": ("kept", "mask_lora")}, "train the same weights"),
        ({"epochs": 0}, "0 epochs"),
        ({"batch": 0}, "batches of 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ReconstructSettings(**settings)


@pytest.mark.parametrize("parts", [("kept", "norms"), ("mask_lora", "norms"), ("mask_lora",), ("norms",), ("biases",)])
def test_default_rates_serve_every_part(parts):
    case = Case("opt", 1)
    losses = case.fit(parts=parts, lr=None)
    assert losses.after < losses.before
    assert ReconstructSettings(parts=parts, lr=0.5).rate == 0.5


@pytest.mark.parametrize("lr", [0.0, -1.0, math.nan])
def test_a_rate_that_cannot_work_is_refused_and_nothing_left_swapped(lr):
    case = Case()
    with pytest.raises(UserError, match="learning rate"):
        case.fit(lr=lr)
    assert case.changed() == set()
