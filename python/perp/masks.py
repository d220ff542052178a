"""Masks in a safetensors file, as bits.

"LAYER.weight" -> uint8 [N, ceil(K/8)], bit j of byte i = column 8 i + j, 1 = kept; its metadata is "perp-masks", a JSON
object of version (1), columns, "LAYER.weight" -> K, and, where there are some, experts, "LAYER.weight" -> E, whose rows
follow each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import perp_kernels as pk
from perp import shards
from perp.errors import UserError

FORMAT, VERSION = "perp-masks", 1


# The bits of a mask [N, K] or [E, N, K] as uint8 [E N, ceil(K/8)], and its shape.
Bits = tuple[Tensor, tuple[int, ...]]


def pack(mask: Tensor) -> Bits:
    return pk.pack_bits(mask.flatten(0, -2)).cpu(), tuple(mask.shape)


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    return pk.unpack_bits(bits, shape[-1]).view(shape)


def write(masks: Mapping[str, Tensor], path: Path) -> None:
    """`masks`: qualified layer name -> bool [N, K] or [E, N, K], True = kept."""
    write_bits({name: pack(mask) for name, mask in masks.items()}, path)


def write_bits(masks: Mapping[str, Bits], path: Path) -> None:
    """`masks`: qualified layer name -> its bits and its shape."""
    bits = {f"{name}.weight": bits for name, (bits, _) in masks.items()}
    shapes = {f"{name}.weight": shape for name, (_, shape) in masks.items()}
    about: dict[str, Any] = {"version": VERSION, "columns": {name: shape[-1] for name, shape in shapes.items()}}
    if experts := {name: shape[0] for name, shape in shapes.items() if len(shape) == 3}:
        about["experts"] = experts
    entries = {name: (tensor.dtype, tensor.shape) for name, tensor in bits.items()}
    shards.write(path, entries, bits.items(), {FORMAT: json.dumps(about)})


def read(path: Path) -> dict[str, Tensor]:
    """The masks that `write` wrote; UserError where the file is damaged."""
    return {name: unpack(*told) for name, told in read_bits(path).items()}


def read_bits(path: Path) -> dict[str, Bits]:
    """The bits of each mask, mapped from the file, and its shape."""
    found: dict[str, Bits] = {}
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(FORMAT, "{}"))
            if about.get("version") != VERSION:
                raise UserError(f"{path} is not a mask file of version {VERSION}; save the model again.")
            for name, columns in about["columns"].items():
                bits = file.get_tensor(name)
                if bits.dtype != torch.uint8 or bits.ndim != 2 or bits.shape[1] != -(-columns // 8):
                    raise ValueError(f"{name} is not packed for {columns} columns")
                experts = about.get("experts", {}).get(name)
                rows = (experts, len(bits) // experts) if experts else (len(bits),)
                found[name.removesuffix(".weight")] = bits, (*rows, columns)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); save the model again.") from error
    return found
