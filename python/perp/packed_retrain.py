"""Retraining a pruned model over its packed weights, from the finished blocks of one stage into those of another.

In memory are the packed weights (mapped from their file), the adapters with their moments, and the activations of one
block; a block's dense weights are made only to write it. On a GPU too small for the packed weights they wait in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perp import head, machine, manifest, packed_model, streamed_save
from perp.adapters import merge
from perp.distil import Teacher
from perp.errors import UserError
from perp.experts import opened
from perp.files import commit, writing
from perp.finished import Finished, Masks
from perp.linear import SparseLinear, swap_linears
from perp.offload import Offload
from perp.parts import count_trainable
from perp.progress import Progress
from perp.residence import put
from perp.retrain import RetrainSettings
from perp.retrain import retrain as train
from perp.stream import Stream

_OUTSIDE, _TRAINED = "outside.safetensors", "perp-trained"


def retrain(
    stream: Stream,
    before: Finished,
    stage: Finished,
    tokenizer: Any,
    windows: Tensor,
    settings: RetrainSettings,
    progress: Progress,
    offload: bool = False,
    teacher: Callable[[], Teacher | None] = lambda: None,
) -> tuple[int, int]:
    """Train the model whose blocks are finished in `before`, and finish them in `stage`.

    `windows`: token ids, int64 [n, T]. What trained outside the blocks is kept in the stage, and put in place: see
    `adopt_outside`. An earlier process's steps and blocks are gone on from. `offload`: packed weights wait in memory
    and are on the device two blocks at a time (`perp.offload`). `teacher` gives the one of `settings.distil`, and is
    asked only if there is something to train. Returns how many parameters were trained, and how many there are.
    """
    base, count = stage.directory / "base", len(stream.blocks)
    if not ended(stream, stage):
        # Before the packed weights are on the device, which it runs every block on.
        taught = teacher()
        machine.trim()
        # Without checkpoints the graph would hold on to every block that was brought.
        offload = offload and settings.checkpointing and stream.model.supports_gradient_checkpointing
        model = _packed(stream, before, tokenizer, base, settings, "cpu" if offload else str(stream.device))
        machine.trim()
        waiting = Offload(model, model.get_submodule(stream.prefix), stream.device) if offload else None
        with waiting.running() if waiting else nullcontext():
            train(model, windows, settings, progress, taught, checkpoint=stage.training)
        machine.trim()
        trained = count_trainable(model)
        names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        own = [name for name in names if not _inside(stream, name) and "lora_" not in name]
        if waiting:
            waiting.merge()
        own += [f"{name}.weight" for name in merge(model) if not _inside(stream, name)]
        _write({name: model.get_parameter(name) for name in own}, stage.directory / _OUTSIDE, trained)
        with opened(stream.model), stream.reading(before.tensors):
            for index in range(count):
                if not stage.has_block(index):
                    _write_block(stream, model, index, before, stage)
        del model
    shutil.rmtree(base, ignore_errors=True)
    return adopt_outside(stream, stage)


def ended(stream: Stream, stage: Finished) -> bool:
    """Whether an earlier process has finished in `stage` all that `retrain` leaves there."""
    return (stage.directory / _OUTSIDE).exists() and all(map(stage.has_block, range(len(stream.blocks))))


def adopt_outside(stream: Stream, stage: Finished) -> tuple[int, int]:
    """Give the model what was trained outside its blocks, the last norm above all; what `retrain` returned."""
    path = stage.directory / _OUTSIDE
    try:
        with safe_open(path, framework="pt") as file:
            counted, total = json.loads(file.metadata()[_TRAINED])
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name).clone()
                parameter = stream.model.get_parameter(name)
                if parameter is stream.model.get_output_embeddings().weight:
                    head.replace_weight(stream.model, tensor)
                else:
                    parameter.data = tensor
            return int(counted), int(total)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{path} is damaged; delete it and run again.") from error


def _write(tensors: Mapping[str, Tensor], path: Path, trained: tuple[int, int]) -> None:
    written = path.with_name(f".{path.name}")
    plain = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    with writing(path.parent):
        save_file(plain, written, metadata={_TRAINED: json.dumps(trained)})
        commit(written, path)


def _packed(
    stream: Stream, before: Finished, tokenizer: Any, base: Path, settings: RetrainSettings, device: str
) -> Any:
    """The model on its packed weights, by way of a directory whose shards are links to those of the stage."""
    masks = before.all_masks(len(stream.blocks))
    about = manifest.build(method="", pattern="", parts=settings.parts, masks=masks, data={}, seeds={})
    streamed_save.save(stream, before, tokenizer, base, about, packed=True)
    dtype = str(stream.model.dtype).removeprefix("torch.")
    model = packed_model.load_weights(base, dtype, device)
    # The packed file has no experts: theirs are packed here, one projection at a time.
    swap_linears(model, {name: mask for name, mask in masks.items() if mask.ndim == 3}, "bitmap")
    return model


def _inside(stream: Stream, name: str) -> bool:
    return name.startswith(f"{stream.prefix}.")


@torch.no_grad()
def _write_block(stream: Stream, model: Any, index: int, before: Finished, stage: Finished) -> None:
    """Merged weights unpacked, and all else that the block holds, into its shard."""
    prefix = f"{stream.prefix}.{index}"
    with stream.enter(index):
        block = stream.blocks[index]
        for name, module in model.get_submodule(prefix).named_modules():
            own = dict(module.named_parameters(recurse=False))
            if isinstance(module, SparseLinear):
                own = {"weight": module.sparse_weight.unpack(), **({"bias": own["bias"]} if "bias" in own else {})}
            put(block.get_submodule(name), own)
        stage.write_block(
            index, lambda path: stream.write(index, path), Masks(before.masks(index)), before.figures(index)
        )
