"""Mixtures of experts: fused weights pruned, adapted and merged, per expert over its own tokens; routers left alone."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from perp import adapters, checkpoints, experts, manifest, parts, retrain, run
from perp.blocks import all_prunable, find_blocks
from perp.errors import UserError
from perp.linear import SparseLinear, swap_linears, unswap
from perp.modes import MODES
from perp.prune import prune_model
from perp.reconstruct import ReconstructSettings
from perp.retrain import RetrainSettings
from perp.settings import RunSettings
from tests.perp import tiny
from tests.perp.families import MIXTURES, build, chooses, undescribed, windows

SETTINGS = RetrainSettings(steps=4, batch=2, lr=1e-2, r=2, alpha=4)


def fused(model):
    return {name: linear for name, linear in all_prunable(model).items() if linear.weight.ndim == 3}


@pytest.mark.parametrize("family", MIXTURES)
def test_opening_changes_nothing_and_closing_gives_everything_back(family):
    model, ids = build(family), windows(2)
    before, logits, kinds = model.state_dict(), model(ids).logits, [type(m) for m in model.modules()]
    size = sum(map(Tensor.numel, model.parameters()))
    with experts.opened(model):
        assert sum(map(Tensor.numel, model.parameters())) == size
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-5)
        assert any(isinstance(module, experts.ExpertLinear) for module in model.modules())
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(ids).logits, logits)


def test_experts_of_another_kind_stay_dense_and_so_does_their_router():
    model = undescribed()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"4 weights .* stay dense, such as model\.layers\.0\.feed_forward\.experts"):
        pruned = prune_model(model, windows(4), "wanda", "0.5", ReconstructSettings(lr=1e-2))
    assert len(pruned.losses) == 4
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(before[name], weight)}
    assert {f"{name}.weight" for name in pruned.masks} == {name for name in changed if "norm" not in name}
    assert not any(".experts." in name or ".router." in name for name in changed)


def test_a_convolution_is_no_experts():
    block = nn.ModuleDict({"mix": nn.Conv1d(8, 8, 3), "up": nn.Linear(8, 8), "down": nn.Linear(8, 2)})
    assert list(experts.linears(block)) == ["up", "down"]


@pytest.mark.parametrize("family", MIXTURES)
def test_what_chooses_is_never_pruned_and_everything_else_is(family):
    model = build(family)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = prune_model(model, windows(8, 24), "magnitude", "0.5")
    prefix, _ = find_blocks(model)
    weights = {name for name, p in model.named_parameters() if p.ndim > 1 and prefix in name and "bias" not in name}
    changed = {name for name in before if not torch.equal(before[name], model.state_dict()[name])}
    assert changed == {name for name in weights if not chooses(name)}
    assert any(map(chooses, weights))
    assert {name.removesuffix(".weight") for name in changed} == set(pruned.masks)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_each_expert_is_pruned_by_its_own_tokens(family, method):
    """As if it were a linear of its own that had read them: the first block, whose inputs no pruning has moved."""
    model, ids = build(family), windows(6, 24)
    dense = copy.deepcopy(model)
    pruned = prune_model(model, ids, method, "0.5/row")
    read: dict[str, list] = {}
    with experts.opened(dense), torch.no_grad():
        for name, linear in fused(dense).items():
            linear.register_forward_pre_hook(lambda _, args, name=name: read.setdefault(name, []).append(args))
        dense(ids)
        for name, linear in fused(dense).items():
            if ".0." not in name:
                continue
            ((x, offsets),) = read[name]
            starts = [0, *offsets.tolist()[:-1]]
            for e, (start, stop) in enumerate(zip(starts, offsets.tolist(), strict=True)):
                own = x[start:stop]
                assert len(own)
                alone = nn.Linear(linear.in_features, linear.out_features, bias=False)
                alone.weight.data = linear.weight[e].clone()
                scores = alone.weight.abs().double() * own.double().square().sum(0).sqrt()
                if method == "wanda":
                    kept = scores.topk(linear.in_features // 2, dim=1).indices
                    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(1, kept, True)
                    assert torch.equal(pruned.masks[name][e], mask)
                after = all_prunable(model)[name].weight[e]
                assert torch.equal(after == 0, ~pruned.masks[name][e])
                errors = [
                    ((w - alone.weight) @ own.T).square().sum() for w in (after, alone.weight * pruned.masks[name][e])
                ]
                # SparseGPT moves the kept weights to make up for the pruned ones; Wanda leaves them.
                assert (errors[0] < errors[1]) if method == "sparsegpt" else torch.equal(*errors)


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_told():
    model = build("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.zero_()  # every token ties, and the first two experts win
    weight = model.model.layers[0].mlp.experts.gate_up_proj[2].detach().clone()
    with pytest.warns(
        UserWarning, match=r"linears read no token .* such as model\.layers\.0\.mlp\.experts\.gate_up_proj\[2\]"
    ):
        pruned = prune_model(model, windows(4), "wanda", "0.5")
    mask = pruned.masks["model.layers.0.mlp.experts.gate_up_proj"][2]
    assert (weight.abs().masked_fill(~mask, 9).amin(1) >= (weight.abs() * ~mask).amax(1)).all()


@pytest.mark.parametrize("mode", MODES)
def test_adapters_compute_their_formula_for_each_expert(mode):
    model, ids = build("mixtral"), windows(3)
    masks = prune_model(model, ids, "magnitude", "2:4").masks
    swap_linears(model, masks)
    adapters.attach(model, mode, r=2, alpha=4)
    layer = model.model.layers[0].mlp.experts.gate_up_proj
    assert isinstance(layer, SparseLinear)
    with torch.no_grad():
        layer.lora_A += 0.2 * torch.randn_like(layer.lora_A)
        layer.lora_B += 0.2 * torch.randn_like(layer.lora_B)
    x, offsets = torch.randn(9, 32), torch.tensor([4, 4, 9])
    found, weight = layer(x, offsets), layer.weight
    for e, (start, stop) in enumerate([(0, 4), (4, 4), (4, 9)]):
        torch.testing.assert_close(found[start:stop], x[start:stop] @ weight[e].T, rtol=1e-4, atol=1e-5)
    if MODES[mode].exact:
        before = model(ids).logits
        adapters.merge(model)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-4)
        unswap(model)
        for name, mask in masks.items():
            assert not all_prunable(model)[name].weight[~mask].any()


@pytest.mark.parametrize("family", MIXTURES)
def test_every_mixture_is_reconstructed_retrained_and_merged(family):
    model, ids = build(family), windows(6, 16)
    before = copy.deepcopy(model.state_dict())
    pruned = prune_model(model, ids, "wanda", "0.5", ReconstructSettings(lr=5e-3))
    assert sum(x.after for x in pruned.losses.values()) < 0.9 * sum(x.before for x in pruned.losses.values())
    total = sum(p.numel() for p in model.parameters())
    swap_linears(model, pruned.masks)
    losses = retrain.retrain(model, ids, dataclasses.replace(SETTINGS, parts=("mask_lora", "norms"), steps=8))
    assert losses[-1] < losses[0]
    assert parts.count_trainable(model)[1] == total
    adapters.merge(model)
    unswap(model)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before if chooses(name) or "embed" in name)
    assert all(not all_prunable(model)[name].weight[~mask].any() for name, mask in pruned.masks.items())


def test_saved_with_its_masks_and_loaded_plain(tmp_path):
    model, ids = build("gpt-oss", vocab_size=300), windows(4)
    pruned = prune_model(model, ids, "wanda", "2:4")
    content = manifest.build(method="wanda", pattern="2:4", masks=pruned.masks, data={}, seeds={})
    checkpoints.save(model, tiny.tokenizer(), tmp_path, pruned.masks, content, packed=True)
    masks = checkpoints.load_masks(tmp_path)
    assert all(torch.equal(masks[name], mask) for name, mask in pruned.masks.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert all(torch.equal(mask, pruned.masks[name]) for name, mask in checkpoints.masks_from_zeros(again).items())


def test_adapters_of_experts_cannot_be_kept(tmp_path):
    job = RunSettings(
        model=str(tiny.model_dir(tmp_path, "mixtral")),
        out=tmp_path / "out",
        data=str(tiny.text_file(tmp_path)),
        retrain=("lora",),
        keep_adapters=True,
        seqlen=16,
        device="cpu",
    )
    with pytest.raises(UserError, match="is of several experts, whose adapters no tool loads; retrain mask_lora"):
        run.run(job)


def test_what_is_a_router():
    model = build("qwen2-moe")
    first = find_blocks(model)[1][0]
    assert {id(router) for router in experts.routers(first)} == {id(first.mlp.gate), id(first.mlp.shared_expert_gate)}
    assert experts.routers(build("llama").model.layers[0]) == []
    listed = nn.Module()
    listed.gate, listed.experts = nn.Linear(8, 3), nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))
    listed.shared = nn.Linear(8, 8)
    assert experts.routers(listed) == [listed.gate]
    assert set(experts.linears(listed)) == {"experts.0.0", "experts.1.0", "experts.2.0", "shared"}
