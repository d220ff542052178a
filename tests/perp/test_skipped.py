"""Linears that are left dense: found by name, kept out of pruning, trained as the others."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import perp
from perp import report, run, skipped
from perp.checkpoints import load_masks
from perp.errors import UserError
from perp.prune import prune_model
from perp.reconstruct import ReconstructSettings
from perp.refine import RefineSettings
from perp.settings import RunSettings
from perp_kernels import Pattern, PatternError

from . import tiny
from .families import build, windows
from .test_cli import SMALL, call, refused

HALF = Pattern.parse("0.5/row")
OF_A_BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def ends(names):
    return sorted(name.removeprefix("model.layers.") for name in names)


@pytest.mark.parametrize(
    "skip, expected",
    [
        ((), []),
        (("down_proj",), ["0.mlp.down_proj", "1.mlp.down_proj"]),
        (("1.mlp.down_proj", "model.layers.0.self_attn.q_proj"), ["0.self_attn.q_proj", "1.mlp.down_proj"]),
        (("layers.1.mlp.*",), ["1.mlp.down_proj", "1.mlp.gate_proj", "1.mlp.up_proj"]),
        (("[kv]_proj",), [f"{i}.self_attn.{name}_proj" for i in (0, 1) for name in "kv"]),
    ],
)
def test_names_are_whole_or_end_behind_a_dot(skip, expected):
    assert ends(skipped.find(build("llama"), HALF, skip)) == expected


@pytest.mark.parametrize("name", ["proj", "own_proj", "layers.2.*", "mlp", "DOWN_PROJ", ""])
def test_a_name_of_nothing_is_refused(name):
    with pytest.raises(UserError, match=r"no linear .* for example, model\.layers\.0\.self_attn\.q_proj"):
        skipped.find(build("llama"), HALF, (name,))


def test_something_is_left_to_prune():
    with pytest.raises(UserError, match="every linear of the blocks is skipped"):
        skipped.find(build("llama"), HALF, ("*",))


def test_an_indivisible_layer_stops_the_run_or_is_skipped():
    model, pattern = build("llama", intermediate_size=50), Pattern.parse("2:4")
    with pytest.raises(PatternError, match=r"0\.mlp\.down_proj has 50 inputs.* with --skip down_proj\.$"):
        skipped.find(model, pattern)
    assert ends(skipped.find(model, pattern, ("down_proj",))) == ["0.mlp.down_proj", "1.mlp.down_proj"]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_others_are_pruned_as_ever_and_the_skipped_stay(method):
    dense, ids = build("llama"), windows(4, 16)
    plain, model = copy.deepcopy(dense), copy.deepcopy(dense)
    expected = prune_model(plain, ids, method, "2:4").masks
    masks = prune_model(model, ids, method, "2:4", skip=("0.mlp.*", "1.self_attn.o_proj")).masks
    assert list(masks) == list(expected)
    for name, mask in masks.items():
        own, weight = name.removeprefix("model.layers."), model.get_submodule(name).weight
        if own.startswith("0.mlp.") or own == "1.self_attn.o_proj":
            assert mask.all()
            assert torch.equal(weight, dense.get_submodule(name).weight)
        else:
            assert (mask.view(-1, 4).sum(1) == 2).all()
            assert not weight[~mask].any()
        if own.startswith("0.self_attn."):  # which reads nothing that was pruned otherwise
            assert torch.equal(mask, expected[name])


def test_recovery_trains_the_skipped_beside_pruned_and_leaves_units_that_lost_nothing():
    dense, ids = build("llama"), windows(6, 16)
    model = copy.deepcopy(dense)
    fit = ReconstructSettings(lr=1e-2)
    found = prune_model(model, ids, "wanda", "0.5", fit, skip=("0.self_attn.*", "0.mlp.down_proj"))
    assert "model.layers.0 (first half)" not in found.losses
    assert len(found.losses) == 3
    for name in ("q_proj", "o_proj"):
        weight = getattr(model.model.layers[0].self_attn, name).weight
        assert torch.equal(weight, getattr(dense.model.layers[0].self_attn, name).weight)
    assert not torch.equal(model.model.layers[0].mlp.down_proj.weight, dense.model.layers[0].mlp.down_proj.weight)


def test_a_unit_that_lost_nothing_makes_up_for_those_before_it_where_asked():
    dense, ids = build("llama"), windows(6, 16)
    model = copy.deepcopy(dense)
    fit = ReconstructSettings(lr=1e-2, targets="dense-model")
    found = prune_model(model, ids, "wanda", "0.5", fit, skip=("1.*",))
    assert len(found.losses) == 4
    assert found.losses["model.layers.1 (first half)"].after < found.losses["model.layers.1 (first half)"].before
    assert not torch.equal(model.model.layers[1].self_attn.q_proj.weight, dense.model.layers[1].self_attn.q_proj.weight)


def test_owl_spreads_the_share_over_what_is_pruned():
    model, ids = build("llama", num_hidden_layers=3), windows(4)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:4, :4] = 20
    found = prune_model(model, ids, "wanda", "0.6", allocate="owl", skip=("layers.0.*",))
    _, one, two = found.shares
    assert one != two
    assert (one + two) / 2 == pytest.approx(0.6, abs=1e-9)
    for name, mask in found.masks.items():
        if name.startswith("model.layers.0."):
            assert mask.all()
        else:
            share = found.shares[int(name.split(".")[2])]
            assert (~mask).sum(1).eq(int(share * mask.shape[1])).all()


def test_experts_refined_and_refitted_beside_skipped_ones():
    model, ids = build("mixtral"), windows(8, 16)
    found = prune_model(
        model, ids, "wanda", "2:4", refine=RefineSettings(), refit=True, skip=("experts.down_proj", "0.self_attn.*")
    )
    refined = {name.partition("[")[0] for name in found.refined}
    for name, mask in found.masks.items():
        dense = name.endswith("experts.down_proj") or ".0.self_attn." in name
        assert mask.float().mean() == (1 if dense else 0.5)
        assert (name in refined) == (not dense)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> RunSettings:
    """A model whose down_proj 2:4 does not divide."""
    directory = tmp_path_factory.mktemp("job")
    return RunSettings(
        model=str(tiny.model_dir(directory, intermediate_size=50)),
        out=directory / "out",
        data=str(tiny.text_file(directory)),
        pattern="2:4",
        skip=("down_proj",),
        epochs=1,
        steps=2,
        batch=1,
        windows=2,
        seqlen=16,
        eval_windows=2,
        device="cpu",
        packed=True,
    )


def check(out: Path) -> dict[str, torch.Tensor]:
    """The saved model's zeros are where its masks say, and nowhere in what was skipped; its weights."""
    model, _ = perp.load(str(out))
    packed, _ = perp.load_packed(out)
    told = json.loads((out / "perp.json").read_text())["sparsity"]
    ids = windows(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    for name, mask in load_masks(out).items():
        weight = model.get_submodule(name).weight
        assert not weight[~mask].any()
        if name.endswith("down_proj"):
            assert mask.all()
            assert (weight != 0).all()
        else:
            assert (mask.view(-1, 4).sum(1) == 2).all()
        assert told[name] == {"pruned": int((~mask).sum()), "total": mask.numel()}
    return model.state_dict()


def test_a_run_in_memory_and_a_streamed_one_leave_the_same(settings, tmp_path):
    found = run.run(settings)
    weights = check(settings.out)
    linears = [weights[f"{name}.weight"] for name in load_masks(settings.out)]
    share = sum(int((weight == 0).sum()) for weight in linears) / sum(weight.numel() for weight in linears)
    assert {row.stage: row.zeros for row in found.rows}[report.RETRAINED] == pytest.approx(share)
    dense, _ = perp.load(settings.model)
    assert not torch.equal(weights["model.layers.0.mlp.down_proj.weight"], dense.model.layers[0].mlp.down_proj.weight)
    run.run(replace(settings, stream=True, out=tmp_path / "streamed"))
    for name, weight in check(tmp_path / "streamed").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-5)


def test_cycles_skip_in_each(settings, tmp_path):
    found = run.run(replace(settings, cycles=2, out=tmp_path / "out"))
    assert found.rows
    check(tmp_path / "out")


def test_the_command_line(settings, tmp_path):
    out = tmp_path / "out"
    job = [settings.model, "--pattern", "2:4", "--data", settings.data, *SMALL]
    for command in ("run", "plan"):
        to = ["--out", out] if command == "run" else []
        refused(call(command, *job, *to), "down_proj has 50 inputs", "with --skip down_proj")
        refused(call(command, *job, *to, "--skip", "downproj"), "no linear of the blocks is called 'downproj'")
    assert not out.exists()
    assert call("plan", *job, "--skip", "down_proj").exit_code == 0
    assert call("run", *job, "--out", out, "--skip", "down_proj,layers.0.*", "--retrain", "none").exit_code == 0
    assert sum(mask.all().item() for mask in load_masks(out).values()) == len(OF_A_BLOCK) + 1
    assert json.loads((out / "perp.json").read_text())["settings"]["skip"] == ["down_proj", "layers.0.*"]
