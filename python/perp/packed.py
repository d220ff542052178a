"""The packed file, OUT/perp/packed.safetensors: the pruned linears of a model as their SparseWeights, written and read.

An ordinary safetensors file. It holds, for each pruned linear NAME, the canonical form of `perp_kernels/layouts.py`:
NAME.values, NAME.index and, where rows keep unequal counts, NAME.row_ptr; semi24 where each four inputs keep exactly
two, else bitmap. Its metadata:

perp-packed           a JSON object of version (1), weights (NAME -> [layout, outputs, inputs]) and
                      checksums (tensor -> CRC-32 of its bytes, eight hexadecimal digits)
perp-packed-checksum  CRC-32 of the file before the tensors, with these eight digits as zeros
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import perp_kernels as pk
from perp.errors import UserError

PACKED = Path("perp", "packed.safetensors")
FORMAT, CHECKSUM, VERSION = "perp-packed", "perp-packed-checksum", 1

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PARTS = ("values", "index", "row_ptr")
_NO_SUM = "0" * 8

# What safetensors itself allows, so that a lie about the length costs no more memory.
_LONGEST_HEADER = 100_000_000

# Values that begin where a cache line does are read faster.
_ALIGNMENT = 64


def write(path: Path, names: Iterable[str], weight: Callable[[str], Tensor], mask: Callable[[str], Tensor]) -> None:
    """Write the packed file of the pruned linears `names`: `weight` and `mask` give each one's [N, K] tensors.

    Both are called again for each layer as it is packed, so that no more than one need be in memory.
    """
    weights: dict[str, list[Any]] = {}
    planned: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in names:
        layout, parts = _form(mask(name), weight(name).dtype)
        weights[name] = [layout, *weight(name).shape]
        planned |= {f"{name}.{part}": form for part, form in parts.items()}
    # The widest elements first: each tensor then begins at a multiple of its own.
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for key, (dtype, shape) in sorted(planned.items(), key=lambda item: -item[1][0].itemsize):
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        spans[key] = begin, end
    entries = {
        key: {"dtype": _NAMES[planned[key][0]], "shape": planned[key][1], "data_offsets": span}
        for key, span in spans.items()
    }
    checksums = dict.fromkeys(spans, _NO_SUM)
    first_values = min((begin for key, (begin, _) in spans.items() if key.endswith(".values")), default=0)
    start = len(_header(entries, weights, checksums, first_values))
    with path.open("wb") as file:
        file.truncate(start + end)
        for name, (layout, *_) in weights.items():
            packed = pk.pack(weight(name), mask(name), layout)
            for part, tensor in packed.components().items():
                key = f"{name}.{part}"
                assert (tensor.dtype, tuple(tensor.shape)) == planned[key]
                content = _bytes(tensor.cpu())
                file.seek(start + spans[key][0])
                file.write(content)
                checksums[key] = _sum(content)
        file.seek(0)
        file.write(_header(entries, weights, checksums, first_values))


def read(path: Path) -> dict[str, pk.SparseWeight]:
    """The weights of a packed file by layer name, mapped from it and not copied; every byte is read and checked.

    UserError, one sentence, for a file that is cut, damaged, not a packed file, or of a newer format version.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head, entries, about = _read_header(file, size)
        return _weights(about, _map(path, size, len(head), entries))
    except _Damaged as error:
        # A damaged file may tell names of any characters.
        what = str(error).encode("unicode_escape").decode()
        raise UserError(f"{path} is damaged ({what}); write it again with perp pack.") from error
    except _Newer as error:
        raise UserError(
            f"{path} has format version {error}; this perp reads up to {VERSION}, so update perp."
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error


class _Damaged(Exception):
    """What is wrong with the file."""


class _Newer(Exception):
    """The version of the file."""


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise _Damaged(what)


def _form(mask: Tensor, dtype: torch.dtype) -> tuple[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """The layout that suits a mask, and dtype and shape of each component in it."""
    N, K = mask.shape
    index = torch.uint8, (N, -(-K // 8))
    if K % 4 == 0 and bool((mask.reshape(N, K // 4, 4).sum(2, dtype=torch.uint8) == 2).all()):
        return "semi24", {"values": (dtype, (N, K // 2)), "index": index}
    counts = mask.sum(1)
    if N == 0 or bool((counts == counts[0]).all()):
        return "bitmap", {"values": (dtype, (N, int(counts[0]) if N else 0)), "index": index}
    return "bitmap", {"values": (dtype, (int(counts.sum()),)), "index": index, "row_ptr": (torch.int64, (N + 1,))}


def _header(entries: dict[str, Any], weights: dict[str, Any], checksums: dict[str, str], first_values: int) -> bytes:
    """All that stands before the tensors; as long whatever the checksums are."""
    about = json.dumps({"version": VERSION, "weights": weights, "checksums": checksums}, separators=(",", ":"))
    metadata = {"format": "pt", FORMAT: about, CHECKSUM: _NO_SUM}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + first_values) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return head.replace(_marked(_NO_SUM), _marked(_sum(head)))


def _marked(checksum: str) -> bytes:
    return f'"{CHECKSUM}":"{checksum}"'.encode()


def _read_header(file: BinaryIO, size: int) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """The bytes before the tensors, the tensors' entries and what the file tells of its weights; all sums checked."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    _need(len(prefix) == 8 and length <= min(size - 8, _LONGEST_HEADER), "it is cut short or not a safetensors file")
    head = prefix + file.read(length)
    header = _parse(head[8:])
    _need(isinstance(header, dict), "its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    _need(isinstance(metadata, dict) and isinstance(metadata.get(FORMAT), str), "it is not a packed file")
    about = _parse(metadata[FORMAT])
    _need(isinstance(about, dict) and _is_size(about.get("version")), "it tells no format version")
    if about["version"] > VERSION:
        raise _Newer(about["version"])
    told = metadata.get(CHECKSUM)
    marked = _marked(told) if isinstance(told, str) and len(told) == len(_NO_SUM) and told.isascii() else b""
    _need(bool(marked) and head.count(marked) == 1, "its header has no checksum")
    _need(_sum(head.replace(marked, _marked(_NO_SUM))) == told, "the checksum of its header differs")
    return head, header, about


def _parse(text: str | bytes) -> Any:
    """What the JSON text says, None where it says nothing."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _map(path: Path, size: int, start: int, entries: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors over the mapped file, which must hold them one after the other, all of them and nothing else."""
    whole = torch.empty(0, dtype=torch.uint8)
    if size > start:
        try:
            whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error
    for key, entry in entries.items():
        _need(isinstance(entry, dict), f"{key} is not described")
        dtype, shape, span = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
        _need(isinstance(dtype, str) and dtype in _DTYPES, f"{key} has an unknown dtype")
        # No part of a layer has a size beyond its bytes, if only because of the index.
        sized = isinstance(shape, list) and len(shape) in (1, 2) and all(_is_size(n) and n <= size for n in shape)
        _need(sized, f"{key} has no valid shape")
        _need(isinstance(span, list) and len(span) == 2 and all(map(_is_size, span)), f"{key} has no valid offsets")
    tensors, end = {}, start
    for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        begin, stop = (start + offset for offset in entry["data_offsets"])
        length = dtype.itemsize * math.prod(shape)
        _need(begin == end and stop - begin == length and stop <= size, f"{key} is not where it should be")
        _need(begin % dtype.itemsize == 0, f"{key} is not aligned")
        tensors[key] = whole[begin:stop].view(dtype).view(shape)
        end = stop
    _need(end == size, "it does not end where its tensors do")
    return tensors


def _weights(about: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, pk.SparseWeight]:
    """The layers made of these tensors, each tensor against its checksum and each layer against its canonical form."""
    weights, checksums = about.get("weights"), about.get("checksums")
    if not (isinstance(weights, dict) and isinstance(checksums, dict)):
        raise _Damaged("it does not tell its weights and checksums")
    _need(set(checksums) == set(tensors), "its checksums are of other tensors")
    for key, tensor in tensors.items():
        _need(_sum(_bytes(tensor)) == checksums[key], f"the checksum of {key} differs")
    found = {}
    for name, told in weights.items():
        _need(isinstance(told, list) and len(told) == 3 and told[0] in ("bitmap", "semi24"), f"{name} has no layout")
        _need(all(map(_is_size, told[1:])), f"{name} has no shape")
        parts = {part: tensors.pop(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in tensors}
        try:
            found[name] = pk.SparseWeight.from_components(parts, (told[1], told[2]), told[0])
        except ValueError as error:
            raise _Damaged(f"{name}: {str(error).rstrip('.')}") from error
    _need(not tensors, "it holds tensors of no layer")
    return found


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def _sum(content: bytes | memoryview) -> str:
    return f"{zlib.crc32(content):08x}"


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
