"""Packed files that lie in ways a checksum does not show: changed, then sealed again."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]


def reseal(content: bytes, change: Callable[[Json, Json], object] = lambda header, about: None) -> bytes:
    """`content` with its header changed (the header's entries, and what it tells of the weights) and every checksum
    that can be made right made right."""
    length = struct.unpack("<Q", content[:8])[0]
    data = content[8 + length :]
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["perp-packed"])
    change(header, about)
    if isinstance(about.get("checksums"), dict):
        for name, entry in header.items():
            if name in about["checksums"]:
                try:
                    begin, end = entry["data_offsets"]
                    about["checksums"][name] = f"{zlib.crc32(data[begin:end]):08x}"
                except (TypeError, KeyError, ValueError):
                    continue
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["perp-packed"] = json.dumps(about, separators=(",", ":"))
        header["__metadata__"]["perp-packed-checksum"] = "00000000"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    told = f'"perp-packed-checksum":"{zlib.crc32(head):08x}"'.encode()
    return head.replace(b'"perp-packed-checksum":"00000000"', told) + data


def _entry(header: Json, numbers: random.Random) -> Json:
    return header[numbers.choice([name for name in header if name != "__metadata__"])]


def _dtype(header: Json, about: Json, numbers: random.Random) -> None:
    kinds = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "", "bf16", None, 7, []]
    _entry(header, numbers)["dtype"] = numbers.choice(kinds)


def _number(numbers: random.Random) -> Any:
    return numbers.choice([-1, 0, 1, 2, 3, 5, 8, 64, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, True, None, "8", []])


def _shape(header: Json, about: Json, numbers: random.Random) -> None:
    entry = _entry(header, numbers)
    kind = numbers.randrange(4)
    if kind == 0:
        entry["shape"] = [_number(numbers) for _ in range(numbers.randint(0, 4))]
    elif kind == 1:
        entry["shape"] = entry["shape"][::-1]
    elif kind == 2:
        entry["shape"][numbers.randrange(len(entry["shape"]))] = _number(numbers)
    else:
        entry["shape"] = [0, numbers.choice([2**62, 2**63, 10**40])]


def _offsets(header: Json, about: Json, numbers: random.Random) -> None:
    entry = _entry(header, numbers)
    kind = numbers.randrange(4)
    if kind == 0:
        entry["data_offsets"] = [_number(numbers) for _ in range(numbers.randint(0, 3))]
    elif kind == 1:
        entry["data_offsets"] = list(_entry(header, numbers)["data_offsets"])
    elif kind == 2:
        shift = numbers.choice([-8, -2, -1, 1, 2, 8, 10**6])
        entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
    else:
        entry["data_offsets"][numbers.randrange(2)] += numbers.choice([-8, -1, 1, 8, 10**9, 2**64])


def _layout(header: Json, about: Json, numbers: random.Random) -> None:
    told = about["weights"][numbers.choice(list(about["weights"]))]
    told[0] = numbers.choice(["dense", "bitmap", "semi24", "", None, 24, ["bitmap"]])


def _size(header: Json, about: Json, numbers: random.Random) -> None:
    told = about["weights"][numbers.choice(list(about["weights"]))]
    told[numbers.randint(1, 2)] = _number(numbers)


def _swapped(header: Json, about: Json, numbers: random.Random) -> None:
    one, other = numbers.sample([name for name in header if name != "__metadata__"], 2)
    header[one], header[other] = header[other], header[one]


def _lacking(header: Json, about: Json, numbers: random.Random) -> None:
    where = numbers.choice([header, header, about, about["weights"], about["checksums"]])
    del where[numbers.choice(list(where))]


def _renamed(header: Json, about: Json, numbers: random.Random) -> None:
    where = numbers.choice([header, about["weights"], about["checksums"]])
    where[numbers.choice(["", ".", "uneven", "uneven.values", "x.index", "é"])] = where.pop(numbers.choice(list(where)))


def _version(header: Json, about: Json, numbers: random.Random) -> None:
    about["version"] = _number(numbers)


HEADER_CHANGES: dict[str, Callable[[Json, Json, random.Random], None]] = {
    "another dtype": _dtype,
    "another shape": _shape,
    "other offsets": _offsets,
    "another layout": _layout,
    "another size of a layer": _size,
    "two tensors swapped": _swapped,
    "an entry left out": _lacking,
    "an entry renamed": _renamed,
    "another version": _version,
}
