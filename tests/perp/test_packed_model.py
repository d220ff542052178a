"""A model on its packed file: the right logits and tokens, and never a dense weight."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perp import checkpoints, models, packed
from perp.errors import UserError
from perp.linear import SparseLinear
from perp.packed_model import load_packed, pack

from . import families, tiny
from .test_checkpoints import manifest_of, prune, save, snapshot

ROOT = Path(__file__).parents[2]
BIG = {
    "num_hidden_layers": 1,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 512,
}
IDS = torch.tensor([[5, 9, 200, 31, 7, 42]])


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model whose smallest linear has more elements than its embeddings have bytes."""
    out = tmp_path_factory.mktemp("big") / "out"
    model = families.build("llama", vocab_size=len(tiny.tokenizer()), **BIG)
    masks = prune(model)
    checkpoints.save(model, tiny.tokenizer(), out, masks, manifest_of(masks), packed=True)
    return out


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_computes_and_generates_what_the_plain_model_does(tmp_path: Path, family: str) -> None:
    save(tmp_path / "out", family, packed=True)
    plain, _ = models.load(str(tmp_path / "out"))
    model, tokenizer = load_packed(tmp_path / "out")
    assert type(model) is type(plain)
    assert not model.training
    layers = {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    assert layers == set(checkpoints.load_masks(tmp_path / "out"))
    ids = torch.as_tensor(tokenizer("seven hills and rain", return_tensors="pt")["input_ids"])
    with torch.no_grad():
        exact = plain.double()(ids).logits
        error = (plain.float()(ids).logits - exact).abs().max()
        assert (model(ids).logits - exact).abs().max() <= 4 * error
    assert torch.equal(model.generate(ids, max_new_tokens=8), plain.float().generate(ids, max_new_tokens=8))
    if plain.config.tie_word_embeddings:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_another_dtype(tmp_path: Path, dtype: str) -> None:
    save(tmp_path / "out", "phi", packed=True)
    model, _ = load_packed(tmp_path / "out", dtype)
    plain, _ = models.load(str(tmp_path / "out"), dtype)
    wanted = {name: parameter.dtype for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        if not name.endswith((".index", ".row_ptr")):
            assert parameter.dtype == wanted[name.replace(".values", ".weight")] == getattr(torch, dtype), name
    for name in checkpoints.load_masks(tmp_path / "out"):
        assert torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight)
    assert model.generate(IDS % 90, max_new_tokens=2).shape == (1, 8)


class Allocations(TorchDispatchMode):
    """The elements of every tensor that an operator makes anew, in ours too."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        if func.namespace == "perp_kernels":
            with self:
                result = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            new = isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in before
            if new and leaf.device.type == "cpu":
                self.elements.append(leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def test_no_dense_weight_is_ever_made(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smallest = min(mask.numel() for mask in checkpoints.load_masks(big).values())
    # In the thread of the mode, which sees no other.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with Allocations() as seen:
        model, _ = load_packed(big)
        model.generate(IDS, max_new_tokens=4)
    whole_file = (big / packed.PACKED).stat().st_size
    plain_file = (big / "model.safetensors").stat().st_size
    assert len(seen.elements) > 100
    assert max(count for count in seen.elements if count not in (whole_file, plain_file)) < smallest
    with Allocations() as seen:
        models.load(str(big))[0].float().generate(IDS, max_new_tokens=1)
        model.get_submodule("model.layers.0.mlp.up_proj").weight  # noqa: B018
    assert max(seen.elements) >= smallest, "this test sees nothing"


def test_resident_memory_is_that_of_the_packed_weights(big: Path) -> None:
    script = """
import json, sys, torch
torch.set_num_threads(1)
from perp import machine, models, packed_model
from transformers.models.llama import modeling_llama
from tests.perp.test_packed_model import IDS
before = sum(machine.resident_parts())
load = packed_model.load_packed if sys.argv[2] == "packed" else models.load
model, _ = load(sys.argv[1])
model.generate(IDS, max_new_tokens=4)
print(json.dumps([sum(machine.resident_parts()) - before, sum(p.nbytes for p in model.parameters())]))
"""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "python")))
    found = {}
    for kind in ("packed", "dense"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(big), kind],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
        found[kind] = json.loads(done.stdout)
    (packed_rss, packed_weights), (dense_rss, dense_weights) = found["packed"], found["dense"]
    assert packed_weights < 0.6 * dense_weights
    # What tokenizer and generation take is the same for both.
    assert dense_rss - packed_rss > 0.8 * (dense_weights - packed_weights)


def test_pack_writes_what_a_run_writes(tmp_path: Path) -> None:
    save(tmp_path / "with", "opt", packed=True)
    save(tmp_path / "without", "opt")
    assert "perp/packed.safetensors" not in snapshot(tmp_path / "without")
    assert pack(tmp_path / "without") == tmp_path / "without" / packed.PACKED
    assert snapshot(tmp_path / "without") == snapshot(tmp_path / "with")
    pack(tmp_path / "without")
    assert snapshot(tmp_path / "without") == snapshot(tmp_path / "with")


def test_pack_takes_a_model_from_elsewhere(tmp_path: Path) -> None:
    model, masks = save(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "perp")
    with pytest.raises(UserError, match=r"masks.safetensors"):
        pack(tmp_path / "out")
    with pytest.raises(UserError, match=r"saved, from-zeros"):
        pack(tmp_path / "out", "guessed")
    pack(tmp_path / "out", "from-zeros")
    loaded, _ = load_packed(tmp_path / "out")
    for name in masks:
        assert torch.equal(loaded.get_submodule(name).weight, model.get_submodule(name).weight)


def test_a_former_models_packed_file_does_not_stay(tmp_path: Path) -> None:
    save(tmp_path / "out", packed=True)
    save(tmp_path / "out", "opt", overwrite=True)
    assert not (tmp_path / "out" / packed.PACKED).exists()


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no directory"):
        load_packed(tmp_path / "nowhere")
    save(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"has no perp/packed.safetensors; write it with perp pack .* or prune with --packed"
    ):
        load_packed(tmp_path / "out")
    save(tmp_path / "other", "opt", packed=True)
    shutil.copy(tmp_path / "other" / packed.PACKED, tmp_path / "out" / packed.PACKED)
    with pytest.raises(UserError, match=r"is no layer of the model"):
        load_packed(tmp_path / "out")
    (tmp_path / "out" / packed.PACKED).write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match=r"is damaged"):
        load_packed(tmp_path / "out")
    with pytest.raises(UserError, match=r"int8"):
        load_packed(tmp_path / "other", "int8")


def test_a_checkpoint_that_lacks_a_weight(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path / "out", packed=True)
    path = tmp_path / "out" / "model.safetensors"
    state = load_file(path)
    del state["model.norm.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its weights, such as model.norm.weight"):
        load_packed(tmp_path / "out")
