"""Masks in a safetensors file, as bits.

"LAYER.weight" -> uint8 [N, ceil(K/8)], bit j of byte i = column 8 i + j, 1 = kept; its metadata is "perp-masks", a JSON
object of version (1) and columns, "LAYER.weight" -> K.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import perp_kernels as pk
from perp import shards
from perp.errors import UserError

FORMAT, VERSION = "perp-masks", 1


def write(masks: Mapping[str, Tensor], path: Path) -> None:
    """`masks`: qualified layer name -> bool [N, K], True = kept."""
    write_bits({name: (pk.pack_bits(mask).cpu(), mask.shape[1]) for name, mask in masks.items()}, path)


def write_bits(masks: Mapping[str, tuple[Tensor, int]], path: Path) -> None:
    """`masks`: qualified layer name -> its bits and its number of columns."""
    bits = {f"{name}.weight": bits for name, (bits, _) in masks.items()}
    columns = {f"{name}.weight": columns for name, (_, columns) in masks.items()}
    entries = {name: (tensor.dtype, tensor.shape) for name, tensor in bits.items()}
    about = {FORMAT: json.dumps({"version": VERSION, "columns": columns})}
    shards.write(path, entries, bits.items(), about)


def read(path: Path) -> dict[str, Tensor]:
    """The masks that `write` wrote; UserError where the file is damaged."""
    return {name: pk.unpack_bits(bits, columns) for name, (bits, columns) in read_bits(path).items()}


def read_bits(path: Path) -> dict[str, tuple[Tensor, int]]:
    """The bits of each mask, mapped from the file, and its number of columns."""
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(FORMAT, "{}"))
            if about.get("version") != VERSION:
                raise UserError(f"{path} is not a mask file of version {VERSION}; save the model again.")
            for name, columns in about["columns"].items():
                bits = file.get_tensor(name)
                if bits.dtype != torch.uint8 or bits.ndim != 2 or bits.shape[1] != -(-columns // 8):
                    raise ValueError(f"{name} is not packed for {columns} columns")
                found[name.removesuffix(".weight")] = bits, columns
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); save the model again.") from error
    return found
