"""Reconstruction by units of every size, from either inputs to either targets, against loops over the blocks."""

from __future__ import annotations

import copy
import gc
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from perp import prune
from perp.blocks import Calls, all_prunable, find_blocks, run_block
from perp.errors import UserError
from perp.experts import ExpertLinear, opened
from perp.granularity import Granularity
from perp.prune import prune_model
from perp.reconstruct import ReconstructSettings, reconstruct
from perp.spans import spans
from perp.unit_loss import LOSSES
from perp.units import units
from tests.perp.families import HIDDEN, build, windows

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
def test_matrices_read_and_are_fitted_to_what_was_asked(inputs, targets):
    dense, ids = build("llama"), windows(3, 16)
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


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "gpt-oss"])
@pytest.mark.parametrize("inputs, targets", [REGIMES[0], REGIMES[2]])
def test_matrices_of_experts_are_fitted_over_the_tokens_routed_to_each(family, inputs, targets):
    dense, ids = build(family), windows(3, 16)
    model = copy.deepcopy(dense)
    settings = ReconstructSettings(("kept",), inputs=inputs, targets=targets, batch=2, **STILL)
    pruned = prune_model(model, ids, "wanda", "0.5", settings, "matrix")
    assert list(pruned.losses) == list(pruned.masks)
    with opened(model), opened(dense):
        names = [name for name, module in model.named_modules() if isinstance(module, ExpertLinear)]
        assert names
        for name in names:
            read = []
            subject = dense if inputs == "dense" else model
            hook = subject.get_submodule(name).register_forward_pre_hook(lambda _, x, read=read: read.append(x))
            for window in ids.split(1):
                subject(window, use_cache=False)
            hook.remove()
            difference = (model.get_submodule(name).weight - dense.get_submodule(name).weight).double()
            errors = []
            for x, ends in read:
                # Biases are alike on both sides and drop out.
                parts = zip([0, *ends.tolist()], ends.tolist(), difference, strict=False)
                own = torch.cat([x[i:j].double() @ w.T for i, j, w in parts])
                assert len(own) == len(x)
                errors.append(own.square().mean().item())
            assert pruned.losses[name].before == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_matrices_of_experts_are_refused_where_two_models_route_apart():
    settings = ReconstructSettings(inputs="sparse", targets="dense-model")
    with pytest.raises(UserError, match="is of several experts, to which the pruned and the dense model send other"):
        prune_model(build("mixtral"), windows(2), "wanda", "0.5", settings, "matrix")


@pytest.mark.parametrize(
    "family, granularity, inputs, targets",
    [
        ("llama", "matrix", *REGIMES[1]),
        ("llama", "half-block", *REGIMES[1]),
        ("llama", "half-block", *REGIMES[2]),
        ("llama", "block", *REGIMES[2]),
        ("llama", "2-blocks", *REGIMES[0]),
        ("llama", "model", *REGIMES[1]),
        ("phi", "matrix", *REGIMES[0]),
        ("mixtral", "matrix", *REGIMES[0]),
        ("qwen2-moe", "matrix", *REGIMES[3]),
        ("phi", "half-block", *REGIMES[1]),
        ("phi", "half-block", *REGIMES[2]),
    ],
)
def test_every_size_fits_better_and_keeps_the_zeros(family, granularity, inputs, targets):
    model, ids = build(family), windows(6, 16)
    settings = ReconstructSettings(lr=5e-3, inputs=inputs, targets=targets)
    pruned = prune_model(model, ids, "wanda", "2:4", settings, granularity)
    count = {"matrix": len(pruned.masks), "half-block": 4, "block": 2}.get(granularity, 1)
    assert len(pruned.losses) == count
    assert sum(losses.after for losses in pruned.losses.values()) < 0.9 * sum(x.before for x in pruned.losses.values())
    for name, mask in pruned.masks.items():
        linear = all_prunable(model)[name]
        assert not linear.weight[~mask].any()
        assert type(linear) is (torch.nn.Linear if mask.ndim == 2 else ExpertLinear)


@pytest.mark.parametrize("granularity", ["half-block", "block", "2-blocks"])
@pytest.mark.parametrize("inputs, targets, stores", [(*REGIMES[0], 2), (*REGIMES[1], 3), (*REGIMES[2], 2)])
def test_no_more_activations_are_alive_than_told(granularity, inputs, targets, stores, monkeypatch):
    """Whenever a unit is fitted: what it reads, its targets and, where the two are of two models, the dense one's."""
    count, found = 5, []

    def watched(*arguments, **named):
        alive = (x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == (1, 16, HIDDEN))
        found.append(len({x.untyped_storage().data_ptr() for x in alive}))
        return reconstruct(*arguments, **named)

    monkeypatch.setattr(prune, "fit", watched)
    settings = ReconstructSettings(("norms",), inputs=inputs, targets=targets, epochs=1)
    prune_model(build("gemma3"), windows(count, 16), "magnitude", "0.5", settings, granularity)
    # Beside the stores: the probe, positions and the like, whose number does not grow with the windows.
    assert found
    assert max(found) < (stores + 1) * count
    assert max(found[1:]) >= stores * count


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


@pytest.mark.parametrize("parts", [("mask_lora", "norms"), ("full",)])
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
