import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

from perp.blocks import Calls, find_blocks, prunable
from perp.errors import UserError
from perp.prune import prune_model
from perp.reconstruct import ReconstructSettings
from perp.units import units
from perp_kernels import Pattern, PatternError, sparsegpt
from tests.perp.families import FAMILIES, build, windows

FIT = ReconstructSettings(lr=1e-2)


def linears_of(model):
    prefix, blocks = find_blocks(model)
    return [prunable(block, f"{prefix}.{i}") for i, block in enumerate(blocks)]


def read_in_a_forward(model, linears, ids):
    """What each linear reads while the whole model runs, float64 [tokens, K], one window after the other."""
    read = {name: [] for name in linears}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: read[name].append(args[0].double().flatten(0, -2)))
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        for window in ids.split(1):
            model(window, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(tokens) for name, tokens in read.items()}


def keep_highest(scores, kept):
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter(-1, scores.topk(kept, dim=-1).indices, True)


def by_hand(model, ids, method):
    """Prune to half block by block, each on a forward of the whole model as pruned so far."""
    masks = {}
    for linears in linears_of(model):
        read = read_in_a_forward(model, linears, ids)
        for name, linear in linears.items():
            weight, x = linear.weight.data, read[name]
            if method == "sparsegpt":
                new, mask = sparsegpt(weight, (x.T @ x).float(), Pattern.parse("0.5/slab"))
            elif method == "wanda":
                mask = keep_highest(weight.double().abs() * x.square().sum(0).sqrt(), weight.shape[1] // 2)
                new = weight * mask
            else:
                mask = keep_highest(weight.abs().flatten(), weight.numel() // 2).view(weight.shape)
                new = weight * mask
            linear.weight.data = new
            masks[name] = mask
    return masks


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("family", ["llama", "opt-post-norm", "gemma3", "phi"])
def test_equals_sequential_pruning_by_hand(family, method):
    model, ids = build(family), windows(5, 20)
    plain = copy.deepcopy(model)
    masks = by_hand(plain, ids, method)
    pruned = prune_model(model, ids, method, "0.5")
    assert list(pruned.masks) == list(masks)
    assert pruned.losses == {}
    assert pruned.seconds > 0
    for name, mask in masks.items():
        assert torch.equal(pruned.masks[name], mask)
    for name, value in plain.state_dict().items():
        if method == "sparsegpt":
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_and_reconstructed_unit_by_unit(family):
    model, ids = build(family), windows(6, 16)
    before = copy.deepcopy(model.state_dict())
    pruned = prune_model(model, ids, "wanda", "0.5", FIT)
    assert len(pruned.losses) == 2 * len(find_blocks(model)[1])
    for losses in pruned.losses.values():
        assert losses.after < 0.9 * losses.before
        assert not losses.restored
    assert set(pruned.masks) == {name for linears in linears_of(model) for name in linears}
    trained = set()
    for name, mask in pruned.masks.items():
        weight = model.get_submodule(name).weight
        assert mask.sum(1).eq(mask.shape[1] // 2).all()
        assert torch.equal(weight[~mask], torch.zeros(int((~mask).sum())))
        trained.add(f"{name}.weight")
    for _, parts in units(model, ids):
        for unit in parts:
            trained |= {f"{name}.{own}" for name, norm in unit.norms.items() for own, _ in norm.named_parameters()}
    after = model.state_dict()
    assert list(after) == list(before)
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained


def parts_of(model, block, granularity):
    return next(parts for index, parts in units(model, granularity=granularity) if index == block)


def mean_square(ones, others):
    return (torch.cat(ones).double() - torch.cat(others).double()).square().mean().item()


@pytest.mark.parametrize("granularity", ["block", "half-block"])
@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_targets_are_what_the_dense_weights_make_of_pruned_inputs(family, granularity, method):
    dense, ids = build(family), windows(4, 16)
    model = copy.deepcopy(dense)
    pruned = prune_model(model, ids, method, "0.5", FIT, granularity)
    calls = Calls(model, ids)
    ahead = parts_of(model, 0, "block")[0]
    with torch.no_grad():
        hidden = [ahead(state, calls.arguments(0, [i])) for i, state in enumerate(calls.hidden)]
        rest = [calls.arguments(1, [i]) for i in range(len(hidden))]
        for which, unit in enumerate(parts_of(model, 1, granularity)):
            target = parts_of(dense, 1, granularity)[which]
            # The unit as its fit found it: its own weights dense but masked, everything else as it ended up.
            begun_model = copy.deepcopy(model)
            begun = parts_of(begun_model, 1, granularity)[which]
            for name, linear in begun.linears.items():
                linear.weight.copy_(target.linears[name].weight * pruned.masks[name])
            for name, norm in begun.norms.items():
                norm.load_state_dict(target.norms[name].state_dict())

            losses = pruned.losses[unit.name]
            wanted, found, left = (
                [run(*call) for call in zip(hidden, rest, strict=True)] for run in (target, begun, unit)
            )
            assert losses.before == pytest.approx(mean_square(found, wanted), rel=1e-4)
            assert losses.after == pytest.approx(mean_square(left, wanted), rel=1e-4)
            if which == 0 and family == "llama":
                hidden = left


@pytest.mark.parametrize("pattern", ["0.5", "0.6", "0.37/row", "0.3/slab", "2:4", "1:8"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_masks_have_the_exact_counts(method, pattern):
    model, ids = build("llama"), windows(2)
    pruned = prune_model(model, ids, method, pattern)
    parsed = Pattern.parse(pattern)
    scope = parsed.scope or {"magnitude": "matrix", "wanda": "row", "sparsegpt": "slab"}[method]
    for name, mask in pruned.masks.items():
        groups = mask.view(-1, parsed.m) if parsed.is_nm else mask if scope == "row" else mask.flatten()[None]
        count = groups.shape[1]
        assert mask.dtype == torch.bool
        assert (groups.sum(1) == count - int(parsed.sparsity * count)).all()
        assert not model.get_submodule(name).weight[~mask].any()


def test_kept_weights_that_are_zero_stay_in_the_mask():
    model = build("llama")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter[:, ::2] = 0
    pruned = prune_model(model, windows(2), "wanda", "0.25")
    for name, mask in pruned.masks.items():
        weight = model.get_submodule(name).weight
        assert (mask.sum(1) == mask.shape[1] * 3 // 4).all()
        assert (mask & (weight == 0)).any()


def test_magnitude_alone_needs_no_text():
    model, other = build("qwen2"), build("qwen2")
    masks = prune_model(model, None, "magnitude", "0.5").masks
    expected = prune_model(other, windows(), "magnitude", "0.5").masks
    assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("parts", [("kept", "norms"), ("mask_lora", "norms")])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_nothing_pruned_nothing_changed(family, parts):
    model = build(family)
    before = copy.deepcopy(model.state_dict())
    pruned = prune_model(model, windows(3), "magnitude", "0.00001", ReconstructSettings(parts=parts, lr=1e-2))
    assert all(mask.all() for mask in pruned.masks.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(losses.after <= losses.before < 1e-9 for losses in pruned.losses.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_repeats_bitwise_in_every_dtype(method, dtype):
    models = []
    for _ in range(2):
        model = build("llama", dtype=dtype)
        losses = prune_model(model, windows(4, 16), method, "2:4", FIT).losses
        assert all(found.after < found.before for found in losses.values())
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        models.append(model)
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models), strict=True))


def test_a_linear_that_reads_nothing_is_pruned_by_magnitude_with_a_warning():
    model = build("llama")
    model.model.layers[1].spare = spare = nn.Linear(32, 8)
    weight = spare.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"1 linears read no token .* such as model\.layers\.1\.spare"):
        pruned = prune_model(model, windows(2), "wanda", "0.5", FIT)
    assert torch.equal(pruned.masks["model.layers.1.spare"], keep_highest(weight.abs(), 16))
    assert torch.equal(spare.weight, weight * pruned.masks["model.layers.1.spare"])


def test_weights_that_are_no_linears_stay_dense_with_one_warning():
    model = build("llama")
    for block in model.model.layers:
        block.mlp.mixed = nn.Parameter(torch.randn(3, 4, 5))
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="2 weights of the blocks are not an nn.Linear's and stay dense") as caught:
        pruned = prune_model(model, windows(4), "wanda", "0.5", FIT)
    assert len(caught) == 1
    assert not any("mixed" in name for name in pruned.masks)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items() if "mixed" in name)


class Record:
    def __init__(self):
        self.seen = []

    def stage(self, name, total):
        self.seen.append((name, total))

    def unit(self, name, **figures):
        self.seen.append((name, sorted(figures)))

    def done(self):
        self.seen.append("done")


@pytest.mark.parametrize("settings, figures", [(None, []), (FIT, ["after", "before"])])
def test_progress_after_every_block(settings, figures):
    record = Record()
    prune_model(build("llama"), windows(2), "wanda", "0.5", settings, progress=record)
    blocks = [(f"model.layers.{i}", figures) for i in range(2)]
    assert record.seen == [("prune", 2), *blocks, "done"]


def refused(error, match, model=None, ids=None, **arguments):
    """The refusal comes before any weight changes."""
    model = model or build("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        prune_model(model, windows(2) if ids is None else ids, **arguments)
    after = model.state_dict()
    assert all(torch.equal(value.nan_to_num(7), after[name].nan_to_num(7)) for name, value in before.items())


def test_bad_input_is_refused_before_any_work():
    refused(PatternError, r"model\.layers\.0\.mlp\.down_proj has 48 inputs", pattern="1:32")
    refused(PatternError, "keeps 3 of every 2", pattern="3:2")
    refused(PatternError, 'sparsegpt cannot prune "0.5/matrix"', method="sparsegpt", pattern="0.5/matrix")
    refused(UserError, "'wander' is not a pruning method", method="wander")
    refused(UserError, "no granularity", granularity="layer", reconstruct=FIT)
    refused(UserError, "at least one window", ids=torch.zeros(0, 8, dtype=torch.int64))
    refused(UserError, "have no biases to reconstruct", reconstruct=ReconstructSettings(parts=("biases",)))
    with pytest.raises(UserError, match="needs windows"):
        prune_model(build("llama"), None, "wanda")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value):
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    refused(UserError, r"model\.layers\.1\.mlp\.up_proj\.weight .* NaN or infinite", model=model)


def test_a_model_without_linears_is_refused():
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    refused(UserError, "hold no nn.Linear to prune", model=transformers.GPT2LMHeadModel(config).eval())


def test_no_warning_without_a_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_model(build("qwen3"), windows(4), "sparsegpt", "0.5", FIT)
