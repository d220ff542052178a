"""Saving the model whose blocks a streamed run has finished: its shards become the model's, without a copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from perp import checkpoints, shards
from perp import manifest as manifests
from perp import masks as mask_files
from perp import packed as packed_files
from perp.finished import Finished, Masks
from perp.models import INDEX, WEIGHTS
from perp.stream import Stream


def save(
    stream: Stream,
    stage: Finished,
    tokenizer: Any,
    out: str | Path,
    manifest: Mapping[str, Any],
    packed: bool = False,
) -> None:
    """As `perp.checkpoints.save`, for a model whose blocks are finished in `stage`; their shards are not copied.

    A block and its masks are in memory at a time. What was in `out` gives way.
    """
    out, count = Path(out), len(stream.blocks)
    masks = stage.all_masks(count)
    checkpoints.check_counts(masks, manifest)
    with stream.reading(stage.tensors):
        for index in range(count):
            with stream.enter(index):
                checkpoints.check_zeros(stream.model, {name: masks[name] for name in stage.masks(index)})
    with checkpoints.staged(out) as staging:
        new = staging / "new"
        (new / checkpoints.MASKS).parent.mkdir(parents=True)
        stream.write_rest(new)
        names = [f"model-{number + 1:05}-of-{count + 1:05}.safetensors" for number in range(count + 1)]
        (new / WEIGHTS).rename(new / names[0])
        for index, name in enumerate(names[1:]):
            _link(stage.weights(index), new / name)
        _write_index(new, names)
        checkpoints.write_tokenizer(tokenizer, new)
        mask_files.write_bits(masks.bits, new / checkpoints.MASKS)
        if packed:
            _write_packed(stream, stage, masks, new / checkpoints.PACKED)
        manifests.write(manifest, new / manifests.NAME)
        checkpoints.finish(new, staging / "old", out)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _write_index(directory: Path, names: Iterable[str]) -> None:
    places: dict[str, str] = {}
    size = 0
    for name in names:
        for key, entry in shards.header(directory / name).items():
            places[key] = name
            size += entry["data_offsets"][1] - entry["data_offsets"][0]
    content = {"metadata": {"total_size": size}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_packed(stream: Stream, stage: Finished, masks: Masks, path: Path) -> None:
    """Layer by layer, its block entered for it: the layers of a block follow one another."""
    with stream.reading(stage.tensors), ExitStack() as entered:
        here: list[int] = []

        def weight(name: str) -> Tensor:
            index = int(name.removeprefix(f"{stream.prefix}.").partition(".")[0])
            if here != [index]:
                entered.close()
                entered.enter_context(stream.enter(index))
                here[:] = [index]
            return stream.model.get_submodule(name).weight.detach()

        # As of a model in memory: the experts' are not packed.
        names = [name for name, (_, shape) in masks.bits.items() if len(shape) == 2]
        packed_files.write(path, names, weight, lambda name: masks[name].to(stream.device))
