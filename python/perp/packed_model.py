"""A model that computes on its packed file, OUT/perp/packed.safetensors, and the file for a model saved without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

import perp_kernels as pk
from perp import checkpoints, machine, models, packed
from perp.errors import UserError
from perp.linear import SparseLinear, replace_module

MASKS = ("saved", "from-zeros")


def load_packed(directory: str | Path, dtype: str | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """The model in `directory`, its pruned linears on their packed weights, and its tokenizer: `load_weights`."""
    packed_file(directory)
    models.check_model(str(directory))
    tokenizer = models.load_tokenizer(str(directory))
    return load_weights(directory, dtype, device), tokenizer


def load_weights(directory: str | Path, dtype: str | None = None, device: str = "cpu") -> Any:
    """The model in `directory` in eval mode, its pruned linears on their packed weights.

    No dense pruned weight is allocated, and the packed ones stay mapped from their file; all other weights come from
    the model's own files. `dtype` None keeps that of the files. UserError, one sentence, where a file lacks or is
    damaged, or where the packed file is of another model.
    """
    machine.check_dtype(dtype)
    name, path = str(directory), packed_file(directory)
    models.check_model(name)
    weights = packed.read(path)
    with models.quiet():
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(name))]
    model = models.load_weights(name, _without_weights(kind, weights, name), dtype)
    model.__class__ = kind
    for layer in list(weights):
        hole = model.get_submodule(layer)
        replace_module(model, layer, SparseLinear(weights.pop(layer).to(dtype=hole.dtype), hole.bias).eval())
    return model.to(device)


def packed_file(directory: str | Path) -> Path:
    """The packed file in `directory`; UserError where there is none."""
    path = Path(directory) / packed.PACKED
    if not Path(directory).is_dir():
        raise UserError(f"there is no directory {directory}; give one that perp run has left.")
    if not path.is_file():
        raise UserError(
            f"{directory} has no {packed.PACKED}; write it with perp pack {directory}, or prune with --packed."
        )
    return path


def pack(directory: str | Path, masks: str = "saved") -> Path:
    """Write the packed file of a pruned model in `directory`, or write it anew; its path.

    The masks are those that perp saved, or "from-zeros" for a model pruned elsewhere: what is zero counts as pruned.
    """
    if masks not in MASKS:
        raise UserError(f"masks cannot be {masks!r}; choose among {', '.join(MASKS)}.")
    if not Path(directory).is_dir():
        raise UserError(f"there is no directory {directory}; give one that holds a pruned model.")
    found = checkpoints.load_masks(directory) if masks == "saved" else None
    model, _ = models.load(str(directory))
    found = checkpoints.masks_from_zeros(model) if found is None else found
    checkpoints.add_packed(model, directory, found)
    return Path(directory) / packed.PACKED


class _Hole(nn.Module):
    """Where a pruned nn.Linear was: its bias, still to be loaded, and no weight that would be allocated."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.dtype = linear.weight.dtype
        self.register_parameter("bias", linear.bias)


def _without_weights(kind: type, weights: dict[str, pk.SparseWeight], name: str) -> type:
    """The model class `kind` with a hole for each of these layers.

    As a class, so that transformers' own loading (keys renamed and fused, tied weights, rotary buffers) does the rest.
    """

    def build(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        kind.__init__(self, config, *arguments, **options)  # type: ignore[misc]
        modules = dict(self.named_modules())
        for layer, weight in weights.items():
            linear = modules.get(layer)
            if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != weight.shape:
                raise UserError(
                    f"{layer} of {packed.PACKED} is no layer of the model in {name}; write it again with perp pack."
                )
            replace_module(self, layer, _Hole(linear))

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})
