"""The safetensors files of a model directory: which tensors they hold, mapped on demand, and what identifies them."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from perp.errors import UserError
from perp.files import flush
from perp.models import INDEX, WEIGHTS

_NAMES = {torch.uint8: "U8", torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_PIECE = 1 << 24


class Shards:
    """The weights of a model directory by the names that its files give them."""

    def __init__(self, directory: Path) -> None:
        """UserError for a file that is missing or damaged, and for a name that the index tells and no file holds."""
        self.directory = directory
        index = directory / INDEX
        told: dict[str, str] = {}
        if index.is_file():
            told = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        self.files = sorted(set(told.values())) if told else [WEIGHTS]
        self._places: dict[str, str] = {}
        for name in self.files:
            self._places |= dict.fromkeys(header(directory / name), name)
        for key in told:
            if key not in self._places:
                raise UserError(f"{index} names {key}, which {told[key]} does not hold; copy all shards again.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def slices(self, keys: Iterable[str]) -> Slices:
        """These tensors as safetensors' slices, mapped and not yet read."""
        return slices({key: self.directory / self._places[key] for key in keys})

    def identity(self) -> dict[str, list[int]]:
        """What changes when a file does: its size, when it was written (ns), and the CRC-32 of its header."""
        return {name: identity(self.directory / name) for name in self.files}


def header(path: Path) -> dict[str, Any]:
    """The entries of a safetensors file by tensor; UserError where it is cut or damaged."""
    try:
        # The library's own reader checks that the header fits the file.
        with safe_open(path, framework="pt"):
            pass
        entries = json.loads(_head(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(path, error) from error
    entries.pop("__metadata__", None)
    return entries


class Slices(dict[str, Any]):
    """Tensors of files by name, as safetensors' slices; `places`: the file of each."""

    places: Mapping[str, Path]


def slices(places: Mapping[str, Path]) -> Slices:
    """The tensors `places` (name -> file) as slices; UserError for a file that is missing, cut or damaged."""
    files = {}
    for path in set(places.values()):
        try:
            files[path] = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise damaged(path, error) from error
    found = Slices({key: files[path].get_slice(key) for key, path in places.items()})
    found.places = places
    return found


def read_through(places: Mapping[str, Path]) -> None:
    """Read the tensors `places` (name -> file) once, so that the system has them in memory; UserError as `slices`."""
    for path in sorted(set(places.values())):
        entries = header(path)
        with path.open("rb", buffering=0) as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            for start, stop in sorted(entries[key]["data_offsets"] for key, own in places.items() if own == path):
                for at in range(begin + start, begin + stop, _PIECE):
                    wanted = min(_PIECE, begin + stop - at)
                    if len(os.pread(file.fileno(), wanted, at)) < wanted:
                        raise damaged(path, "it ends too early")


def damaged(path: Path, why: object) -> UserError:
    return UserError(f"{path} is truncated or damaged ({why}); copy it again.")


def identity(path: Path) -> list[int]:
    about = path.stat()
    return [about.st_size, about.st_mtime_ns, zlib.crc32(_head(path))]


def checksum(path: Path) -> int:
    """CRC-32 of a whole file."""
    found = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found = zlib.crc32(piece, found)
    return found


def number(key: str) -> int | None:
    """The number of the block that a tensor's name tells, which is the first number in it."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", key)
    return int(found[1]) if found else None


def write(
    path: Path,
    entries: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """A safetensors file of `entries` (name -> dtype, shape), filled one tensor at a time, and flushed.

    `tensors` gives every entry once, in any order.
    """
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # Widest first, so that each tensor begins at a multiple of its element's size.
    for name, (dtype, shape) in sorted(entries.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        described[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    missing = set(entries)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, tensor in tensors:
            missing.remove(name)
            assert (tensor.dtype, list(tensor.shape)) == (entries[name][0], list(entries[name][1]))
            file.seek(8 + len(text) + described[name]["data_offsets"][0])
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    assert not missing
    flush(path)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))
