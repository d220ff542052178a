"""Reconstruction by units of every size, from either inputs to either targets, against loops over the blocks."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from perp.blocks import Calls, find_blocks, run_block
from perp.errors import UserError
from perp.granularity import Granularity
from perp.prune import prune_model
from perp.reconstruct import ReconstructSettings, reconstruct
from perp.spans import spans
from perp.unit_loss import LOSSES
from perp.units import units
from tests.perp.families import build, windows

REGIMES = [("sparse", "dense-weights"), ("sparse", "dense-model"), ("dense", "dense-weights"), ("dense", "dense-model")]
STILL = {"lr": 1e-30}


def walk(model, hidden, calls, indices):
    """The hidden states of all windows behind these blocks."""
    blocks = find_blocks(model)[1]
    for i in indices:
        hidden = [run_block(blocks[i], state, calls.arguments(i, [w])) for w, state in enumerate(hidden)]
    return hidden


def mean(error, ones, others):
    return sum(error(a.double(), b.double()).item() for a, b in zip(ones, others, strict=True)) / len(ones)


@torch.no_grad()
@pytest.mark.parametrize(
    "inputs, targets, loss", [(*pair, loss) for pair, loss in zip(REGIMES, [*LOSSES, "mse"], strict=True)]
)
@pytest.mark.parametrize("granularity, size", [("block", 1), ("2-blocks", 2), (3, 3), ("model", 4)])
def test_units_read_and_are_fitted_to_what_was_asked(granularity, size, inputs, targets, loss):
    """With a rate of nothing the pruned model is known in full, and so is every unit's loss."""
    dense, ids = build("gemma3"), windows(3, 16)
    model = copy.deepcopy(dense)
    settings = ReconstructSettings(inputs=inputs, targets=targets, loss=loss, **STILL)
    pruned = prune_model(model, ids, "wanda", "0.5", settings, granularity)
    for name, mask in pruned.masks.items():
        assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight * mask)
    calls = Calls(dense, ids)
    groups = [range(i, min(i + size, 4)) for i in range(0, 4, size)]
    assert len(pruned.losses) == len(groups)
    for group, losses in zip(groups, pruned.losses.values(), strict=True):
        before = range(group.start)
        read = walk(dense if inputs == "dense" else model, calls.hidden, calls, before)
        taught = read if targets == "dense-weights" else walk(dense, calls.hidden, calls, before)
        expected = mean(LOSSES[loss], walk(model, read, calls, group), walk(dense, taught, calls, group))
        assert losses.before == pytest.approx(expected, rel=1e-4, abs=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("inputs, targets", REGIMES)
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_matrices_read_and_are_fitted_to_what_was_asked(family, inputs, targets):
    dense, ids = build(family), windows(3, 16)
    model = copy.deepcopy(dense)
    settings = ReconstructSettings(("kept",), inputs=inputs, targets=targets, **STILL)
    pruned = prune_model(model, ids, "wanda", "0.5", settings, "matrix")
    assert list(pruned.losses) == list(pruned.masks)

    def read(subject):
        found = {name: [] for name in pruned.masks}
        hooks = [
            subject.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: found[name].append(x[0]))
            for name in found
        ]
        for window in ids.split(1):
            subject(window, use_cache=False)
        for hook in hooks:
            hook.remove()
        return found

    given, others = read(dense if inputs == "dense" else model), read(dense)
    for name, losses in pruned.losses.items():
        taught = others if targets == "dense-model" else given
        outputs = map(model.get_submodule(name), given[name])
        expected = mean(LOSSES["mse"], list(outputs), list(map(dense.get_submodule(name), taught[name])))
        assert losses.before == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("inputs, targets", REGIMES[:3])
@pytest.mark.parametrize("granularity", ["matrix", "half-block", "block", "2-blocks", "model"])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_every_size_fits_better_and_keeps_the_zeros(family, granularity, inputs, targets):
    model, ids = build(family), windows(6, 16)
    settings = ReconstructSettings(lr=5e-3, inputs=inputs, targets=targets)
    pruned = prune_model(model, ids, "wanda", "2:4", settings, granularity)
    count = {"matrix": len(pruned.masks), "half-block": 4, "block": 2}.get(granularity, 1)
    assert len(pruned.losses) == count
    assert sum(losses.after for losses in pruned.losses.values()) < 0.9 * sum(x.before for x in pruned.losses.values())
    for name, mask in pruned.masks.items():
        weight = model.get_submodule(name).weight
        assert not weight[~mask].any()
        assert type(model.get_submodule(name)) is torch.nn.Linear


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_falls(loss):
    model, ids = build("llama"), windows(6, 16)
    pruned = prune_model(model, ids, "wanda", "0.5", ReconstructSettings(lr=5e-3, loss=loss))
    assert all(losses.after < 0.9 * losses.before for losses in pruned.losses.values())


def test_losses_are_their_definitions():
    a, b = torch.randn(2, 5, 7).double(), torch.randn(2, 5, 7).double()
    assert LOSSES["mse"](a, b).item() == pytest.approx(((a - b) ** 2).sum().item() / 70)
    assert LOSSES["nmse"](a, b).item() == pytest.approx(((a - b) ** 2).sum().item() / (b**2).sum().item())
    assert LOSSES["nmse"](torch.zeros_like(b), b).item() == pytest.approx(1)
    cosines = [F.cosine_similarity(x, y, dim=0) for x, y in zip(a.flatten(0, 1), b.flatten(0, 1), strict=True)]
    assert LOSSES["cosine"](a, b).item() == pytest.approx(1 - torch.stack(cosines).mean().item())
    assert LOSSES["cosine"](3 * b, b).item() == pytest.approx(0, abs=1e-12)
    for error in LOSSES.values():
        assert (
            error(torch.ones(1, 4, dtype=torch.float16), torch.ones(1, 4, dtype=torch.float16)).dtype == torch.float32
        )
        assert error(torch.ones(1, 4), torch.zeros(1, 4)).isfinite()


@pytest.mark.parametrize("parts", [("kept", "norms"), ("mask_lora", "norms"), ("scale_lora",), ("full",)])
def test_a_span_of_one_block_is_that_block(parts):
    """The same training to the bit, although a span computes each block again in the backward pass."""
    found = []
    for unit_of in (lambda m: next(units(m, granularity="block"))[1][0], lambda m: next(spans(m, 1))):
        model, ids = build("qwen3"), windows(4, 16)
        calls = Calls(model, ids)
        unit = unit_of(model)
        own = partial(calls.arguments, 0)
        arguments = own if "Span" not in type(unit).__name__ else lambda ids, own=own: [own(ids)]
        with torch.no_grad():
            targets = [unit(state, arguments([i])) for i, state in enumerate(calls.hidden)]
        masks = {name: linear.weight.abs() > linear.weight.abs().median() for name, linear in unit.linears.items()}
        for name, linear in unit.linears.items():
            linear.weight.data *= masks[name]
        losses = reconstruct(unit, masks, calls.hidden, targets, arguments, ReconstructSettings(parts, lr=5e-3))
        assert losses.after < losses.before
        found.append((losses, model.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


@pytest.mark.parametrize(
    "text, name, blocks",
    [
        ("half-block", "half-block", 1),
        ("4-blocks", "4-blocks", 4),
        (4, "4-blocks", 4),
        ("1", "block", 1),
        ("model", "model", None),
    ],
)
def test_names_of_sizes(text, name, blocks):
    assert Granularity.parse(text) == Granularity(name, blocks)
    assert str(Granularity.parse(text)) == name
    assert Granularity.parse(Granularity.parse(text)) == Granularity(name, blocks)


@pytest.mark.parametrize("text", ["layer", "0", 0, "0-blocks", "blocks", "", "-2"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="is no granularity; choose matrix, half-block, block, model or a number"):
        Granularity.parse(text)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"inputs": "pruned"}, "inputs cannot be 'pruned'; choose sparse or dense"),
        ({"targets": "dense"}, "targets cannot be 'dense'; choose dense-weights or dense-model"),
        ({"loss": "ce"}, "'ce' is not a loss of reconstruction; choose one of mse, nmse, cosine"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(UserError, match=message):
        ReconstructSettings(**wrong)


def test_lora_prune_tells_what_its_merge_lost():
    model, ids = build("llama"), windows(6, 16)
    settings = ReconstructSettings(("lora_prune",), lr=1e-2)
    pruned = prune_model(model, ids, "wanda", "0.5", settings)
    kept = [losses for losses in pruned.losses.values() if not losses.restored]
    assert kept
    assert all(losses.unmerged < losses.after < losses.before for losses in kept)
    exact = prune_model(build("llama"), ids, "wanda", "0.5", ReconstructSettings(("spp",), lr=1e-2))
    assert all(losses.unmerged is None for losses in exact.losses.values())
