"""Packed weights brought a block at a time, on the CPU as its own device."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from perp import adapters, run, settings
from perp.blocks import all_prunable, find_blocks
from perp.linear import SparseLinear, swap_linears
from perp.lock import locked
from perp.offload import Offload
from perp.plan import Plan, Stage
from perp.progress import Silent
from perp.retrain import RetrainSettings, retrain
from perp.settings import RunSettings
from perp_kernels import Pattern, select

from . import families, tiny
from .kill import hashes

BLOCKS = 4


def pruned(layout: str):
    model = families.build("llama", num_hidden_layers=BLOCKS)
    pattern = Pattern.parse("2:4" if layout == "semi24" else "0.5/row")
    swap_linears(
        model, {name: select(linear.weight.abs(), pattern) for name, linear in all_prunable(model).items()}, layout
    )
    return model


def trained(layout: str, offload: bool, checkpointing: bool = True):
    """The merged model, its losses, and where the packed weights were whenever one was computed with."""
    model = pruned(layout)
    settings = RetrainSettings(steps=3, batch=2, checkpointing=checkpointing)
    waiting = Offload(model, find_blocks(model)[1], "cpu") if offload else None
    places: set[int] = set()
    with waiting.running() if waiting else nullcontext():
        for layer in model.modules():
            if isinstance(layer, SparseLinear):
                layer.register_forward_pre_hook(lambda own, _: places.add(own.values.untyped_storage().data_ptr()))
        losses = retrain(model, families.windows(4, 12), settings)
    if waiting:
        waiting.merge()
    adapters.merge(model)
    return model, losses, places


@pytest.mark.parametrize("layout", ["bitmap", "semi24"])
def test_offloading_changes_no_bit_and_has_two_blocks_there(layout):
    whole, expected, everywhere = trained(layout, offload=False)
    ours, losses, places = trained(layout, offload=True)
    assert losses == expected
    assert len(everywhere) == BLOCKS * 7
    assert len(places) == 2
    before = pruned(layout)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    moved = [name for name, tensor in before.state_dict().items() if not torch.equal(whole.state_dict()[name], tensor)]
    assert len([name for name in moved if name.endswith(".values")]) == BLOCKS * 7


def test_a_graph_that_outlives_its_weights_is_refused():
    """Without checkpoints the backward pass would read weights of another block."""
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trained("bitmap", offload=True, checkpointing=False)


def test_a_failure_leaves_the_weights_in_memory():
    model = pruned("bitmap")
    held = {name: layer.values for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
    waiting = Offload(model, find_blocks(model)[1], "cpu")

    def fail(*_) -> None:
        raise KeyboardInterrupt

    find_blocks(model)[1][1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), waiting.running():
        model(families.windows(1, 8))
    for name, values in held.items():
        assert model.get_submodule(name).values is values


def test_a_streamed_run_gives_the_same_bytes_offloaded_and_read_ahead(tmp_path):
    words = tiny.tokenizer()
    families.build("llama", vocab_size=len(words)).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    words.save_pretrained(tmp_path / "model")
    job = RunSettings(
        model=str(tmp_path / "model"),
        out=tmp_path,
        data=str(tiny.text_file(tmp_path)),
        pattern="2:4",
        epochs=1,
        steps=2,
        batch=1,
        compare=(),
        windows=2,
        seqlen=16,
        eval_windows=1,
        device="cpu",
        stream=True,
    )
    found = []
    for sparing in (False, True):
        own = replace(job, out=tmp_path / str(sparing))
        with locked(own.out):
            plan = Plan(True, "memory", (Stage("all", 0, 0, 0, 0.0),), ahead=sparing, offload=sparing)
            run.carry_out(own, settings.check(own), plan, Silent())
        found.append(hashes(own.out))
    assert found[0] == found[1]
    assert any(name.endswith(".safetensors") for name in found[0])
