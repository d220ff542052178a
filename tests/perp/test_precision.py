import copy
import dataclasses

import pytest
import torch

from perp import adapters, precision, prune, reconstruct, retrain
from perp.blocks import is_norm
from perp.errors import UserError
from perp.linear import SparseLinear, unswap
from perp.retrain import RetrainSettings

from . import families
from .families import full_loss

SETTINGS = RetrainSettings(steps=6, batch=2, lr=1e-2, r=2, alpha=4, precision="bf16")


@pytest.mark.parametrize(
    "family, chosen",
    [
        ("llama", ("mask_lora", "norms")),
        ("gemma2", ("lora_prune", "norms")),
        ("opt", ("full",)),
        ("phi", ("spp", "biases", "head")),
    ],
)
def test_training_in_bf16_ends_in_fp32_near_the_fp32_training(family, chosen):
    ids = families.windows(2, 12)
    wide, narrow = families.pruned(family), families.pruned(family)
    settings = dataclasses.replace(SETTINGS, parts=chosen, lr=1e-3 if "full" in chosen else 1e-2)
    expected = retrain.retrain(wide, ids, dataclasses.replace(settings, precision="model"))
    losses = retrain.retrain(narrow, ids, settings)
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.05)
    assert {p.dtype for p in narrow.parameters() if p.is_floating_point()} == {torch.float32}
    masks = {n: m.sparse_weight.mask() for n, m in narrow.named_modules() if isinstance(m, SparseLinear)}
    adapters.merge(narrow)
    unswap(narrow)
    assert all(not narrow.get_submodule(name).weight[~mask].any() for name, mask in masks.items())
    assert full_loss(narrow, ids).item() < expected[0] - 0.5 * (expected[0] - expected[-1])


def test_frozen_weights_come_back_to_the_bit_and_small_updates_are_not_lost():
    model = families.pruned("llama")
    before = copy.deepcopy(dict(model.named_parameters()))
    # Far below the rounding of a bf16 1: only an fp32 copy adds up such steps.
    retrain.retrain(model, families.windows(), dataclasses.replace(SETTINGS, parts=("kept",), lr=1e-6))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not name.endswith("values"), name
        assert (parameter - before[name]).abs().max() < 1e-4 if name.endswith("values") else True


def test_what_is_narrow_inside():
    model = families.pruned("opt")
    adapters.attach(model, "mask_lora", r=2)
    norms = {f"{name}.{own}" for name, m in model.named_modules() if is_norm(m) for own, _ in m.named_parameters()}
    with precision.narrowed(model, torch.bfloat16) as masters:
        wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
        linears = {name for name, m in model.named_modules() if isinstance(m, SparseLinear)}
        assert wide == norms | {f"{name}.{own}" for name in linears for own in ("lora_A", "lora_B", "bias")}
        assert model(families.windows()).logits.dtype == torch.bfloat16
        assert all(p.dtype == torch.bfloat16 and m.dtype == torch.float32 for p, m in masters.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("parts, lr", [(("kept", "norms"), 3e-3), (("mask_lora",), 1e-2)])
def test_a_unit_fitted_in_bf16_ends_in_fp32_near_the_fp32_fit(parts, lr):
    ends, models = {}, {}
    for name in precision.PRECISIONS:
        models[name] = families.build("llama")
        settings = reconstruct.ReconstructSettings(parts=parts, lr=lr, epochs=4, r=4, precision=name)
        ends[name] = prune.prune_model(models[name], families.windows(8, 12), "wanda", "2:4", settings).losses
    for (unit, wide), narrow in zip(ends["model"].items(), ends["bf16"].values(), strict=True):
        assert wide.after != narrow.after < wide.before, unit
        assert narrow.after == pytest.approx(wide.after, rel=0.05), unit
    assert {parameter.dtype for parameter in models["bf16"].parameters()} == {torch.float32}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in models["bf16"].modules())


def test_only_the_products_of_a_unit_are_narrow():
    model = families.pruned("opt")
    layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
    own = [layer.values.data_ptr() for layer in layers]
    with precision.narrowed_linears(layers, torch.bfloat16) as masters:
        assert {layer.values.dtype for layer in layers} == {torch.bfloat16}
        assert [masters[layer.values].data_ptr() for layer in layers] == own
        assert model(families.windows()).logits.dtype == torch.float32
    assert [layer.values.data_ptr() for layer in layers] == own


def test_float16_is_refused():
    with pytest.raises(UserError, match="float16, which bf16 does not widen"):
        retrain.retrain(families.pruned(dtype=torch.float16), families.windows(), SETTINGS)


def test_a_model_already_narrow_trains_as_it_is():
    ids = families.windows()
    one, other = families.pruned(dtype=torch.bfloat16), families.pruned(dtype=torch.bfloat16)
    settings = dataclasses.replace(SETTINGS, parts=("mask_lora",))
    plain = retrain.retrain(one, ids, dataclasses.replace(settings, precision="model"))
    assert retrain.retrain(other, ids, settings) == pytest.approx(plain, rel=2e-2)
    assert {p.dtype for p in other.parameters() if not p.requires_grad and p.is_floating_point()} == {torch.bfloat16}
