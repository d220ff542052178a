"""The packed file: its form, and a reader that meets every damage with one sentence."""

from __future__ import annotations

import json
import random
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import perp_kernels as pk
from perp import packed
from perp.errors import UserError

from .fuzzing import HEADER_CHANGES, reseal

MASKS = {
    "uneven": lambda g: torch.rand(5, 19, generator=g) < 0.4,
    "even": lambda g: torch.rand(6, 24, generator=g).argsort(1) < 7,
    "pairs": lambda g: torch.rand(3, 5, 4, generator=g).argsort(2).reshape(3, 20) < 2,
    "nothing": lambda g: torch.zeros(2, 9, dtype=torch.bool),
}


def layers(dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, draw in MASKS.items():
        mask = draw(generator)
        made[name] = torch.randn(mask.shape, generator=generator).to(dtype) * mask, mask
    return made


def write(path: Path, made: dict[str, tuple[Tensor, Tensor]]) -> Path:
    packed.write(path, made, lambda name: made[name][0], lambda name: made[name][1])
    return path


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("packed") / "packed.safetensors", layers()).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    made = layers(dtype)
    path = write(tmp_path / "file", made)
    found = packed.read(path)
    assert list(found) == list(made)
    for name, (weight, mask) in made.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name].mask(), mask)
        assert torch.equal(found[name].unpack(), weight)
    assert [found[name].layout for name in made] == ["bitmap", "bitmap", "semi24", "bitmap"]
    assert [found[name].row_ptr is not None for name in made] == [True, False, False, False]


def test_weights_of_several_dtypes_are_aligned(tmp_path: Path) -> None:
    made = {
        f"{dtype}.{name}": layer for dtype in (torch.bfloat16, torch.float32) for name, layer in layers(dtype).items()
    }
    found = packed.read(write(tmp_path / "file", made))
    for name, (weight, _) in made.items():
        assert torch.equal(found[name].unpack(), weight)
        assert found[name].values.data_ptr() % weight.element_size() == 0
    one = packed.read(write(tmp_path / "one", {"even": layers()["even"]}))["even"]
    assert one.values.data_ptr() % 64 == 0


def test_no_layers(tmp_path: Path) -> None:
    assert packed.read(write(tmp_path / "file", {})) == {}


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    assert write(tmp_path / "a", layers()).read_bytes() == write(tmp_path / "b", layers()).read_bytes()


def test_any_tool_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path / "file", layers())
    found = packed.read(path)
    with safe_open(path, framework="pt") as file:
        assert len(file.keys()) == 9
        for name, weight in found.items():
            for part, tensor in weight.components().items():
                assert torch.equal(file.get_tensor(f"{name}.{part}"), tensor)


def test_the_sums_are_what_the_format_says(content: bytes) -> None:
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["perp-packed"])
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            assert about["checksums"][name] == f"{zlib.crc32(content[begin:end]):08x}"
    told = header["__metadata__"]["perp-packed-checksum"]
    blank = content[: 8 + length].replace(
        f'"perp-packed-checksum":"{told}"'.encode(), b'"perp-packed-checksum":"00000000"'
    )
    assert told == f"{zlib.crc32(blank):08x}"


def test_a_newer_version_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content.replace(rb"{\"version\":1", rb"{\"version\":2"))
    with pytest.raises(UserError, match=r"^.* has format version 2; this perp reads up to 1, so update perp\.$"):
        packed.read(path)


def test_no_file_and_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match=r"cannot be read \(.*\)\.$"):
            packed.read(path)


def test_reading_copies_nothing(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1024, 2048, generator=generator).argsort(1) < 1024
    path = write(tmp_path / "file", {"one": (torch.randn(1024, 2048) * mask, mask)})
    weight = packed.read(path)["one"]
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    spans = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in maps]
    for tensor in weight.components().values():
        assert any(begin <= tensor.data_ptr() < end for begin, end in spans)


class Fuzz:
    """Reads changed files: each gives a UserError of one sentence or usable weights; counts what was tried."""

    def __init__(self, content: bytes, path: Path) -> None:
        self.content, self.path = content, path
        self.tried: Counter[str] = Counter()
        self.right = {name: weight for name, (weight, _) in layers().items()}

    def __call__(self, kind: str, changed: bytes, sealed: bool = False) -> None:
        self.tried[kind] += 1
        self.path.write_bytes(changed)
        try:
            found = packed.read(self.path)
        except UserError as error:
            told = str(error)
            assert told.startswith(str(self.path)), told
            assert told.endswith("."), told
            assert "\n" not in told
            return
        if not sealed:
            assert changed == self.content, f"{kind}: a changed file was read"
        # A sealed change makes another file, which may be a valid one: then it can be computed with.
        for name, weight in found.items():
            dense = weight.unpack()
            assert sealed or torch.equal(dense, self.right[name])
            assert pk.sparse_linear(dense[:1], weight).shape == (1, len(dense))


@pytest.fixture
def fuzz(content: bytes, tmp_path: Path) -> Iterator[Fuzz]:
    shared_memory = Path("/dev/shm")
    folder = shared_memory if shared_memory.is_dir() else tmp_path
    path = folder / f"perp-fuzz-{random.getrandbits(64):x}"
    yield Fuzz(content, path)
    path.unlink(missing_ok=True)


def every_length(fuzz: Fuzz, content: bytes) -> None:
    for length in range(len(content)):
        fuzz("cut short", content[:length])
    for extra in (b"\0", b" ", bytes(64), content):
        fuzz("made longer", content + extra)


def every_bit(fuzz: Fuzz, content: bytes) -> None:
    bits = range(8 * len(content))
    chosen = random.Random(0).sample(bits, 9000) if len(bits) > 9000 else bits
    for bit in chosen:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        fuzz("one bit flipped", bytes(changed))


def lies_about_the_length_of_the_header(fuzz: Fuzz, content: bytes) -> None:
    true = struct.unpack("<Q", content[:8])[0]
    numbers = random.Random(1)
    lies = [0, 1, true - 1, true + 1, len(content) - 8, len(content), 10**8, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    for lie in lies + [numbers.getrandbits(numbers.randint(1, 64)) for _ in range(300)]:
        fuzz("another length of the header", struct.pack("<Q", lie) + content[8:])


def bytes_of_chance(fuzz: Fuzz, content: bytes) -> None:
    numbers = random.Random(2)
    for _ in range(300):
        fuzz("random bytes", numbers.randbytes(numbers.randint(0, 400)))
    for _ in range(600):
        begin = numbers.randrange(len(content))
        end = min(len(content), begin + numbers.randint(1, 64))
        fuzz("bytes replaced", content[:begin] + numbers.randbytes(end - begin) + content[end:])
        fuzz("bytes left out", content[:begin] + content[end:])


def headers_that_lie_under_a_right_checksum(fuzz: Fuzz, content: bytes) -> None:
    numbers = random.Random(3)
    for _ in range(1200):
        kind = numbers.choice(list(HEADER_CHANGES))
        changed = reseal(content, lambda header, about, kind=kind: HEADER_CHANGES[kind](header, about, numbers))
        fuzz(kind, changed, sealed=True)


def tensors_that_lie_under_right_checksums(fuzz: Fuzz, content: bytes) -> None:
    """Values may be anything; an index or a row_ptr that is not canonical must be found.

    A semi24 nibble may become another rising pair, which is canonical.
    """
    length = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:length])
    for name, entry in header.items():
        if name == "__metadata__" or name.endswith(".values"):
            continue
        begin, end = entry["data_offsets"]
        for bit in range(8 * begin, 8 * end):
            data = bytearray(content[length:])
            data[bit // 8] ^= 1 << bit % 8
            changed = reseal(content[:length] + bytes(data))
            fuzz("one bit of an index or a row_ptr flipped", changed, sealed=name == "pairs.index")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
HYPOTHESIS = settings(max_examples=400, deadline=None, derandomize=True)


def any_json(fuzz: Fuzz, content: bytes) -> None:
    @HYPOTHESIS
    @given(value=JSON)
    def read(value: object) -> None:
        text = json.dumps(value).encode()
        fuzz("any JSON as the header", struct.pack("<Q", len(text)) + text)

    read()


def any_json_in_the_place_of_a_part(fuzz: Fuzz, content: bytes) -> None:
    @HYPOTHESIS
    @given(data=st.data())
    def read(data: st.DataObject) -> None:
        def change(header: dict, about: dict) -> None:
            where: dict | list = data.draw(st.sampled_from([header, about]))
            for _ in range(data.draw(st.integers(0, 3))):
                inner = [value for value in (where.values() if isinstance(where, dict) else where) if value]
                inner = [value for value in inner if isinstance(value, (dict, list))]
                if not inner:
                    break
                where = data.draw(st.sampled_from(inner))
            keys = list(where) if isinstance(where, dict) else list(range(len(where)))
            where[data.draw(st.sampled_from(keys))] = data.draw(JSON)

        fuzz("any JSON in the place of a part of the header", reseal(content, change), sealed=True)

    read()


def nesting(fuzz: Fuzz, content: bytes) -> None:
    for depth in (1_000, 100_000, 1_000_000):
        for text in (b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth):
            fuzz("deep nesting", struct.pack("<Q", len(text)) + text)


# How often each trial changes the file, by kind.
TRIALS: dict[Callable[[Fuzz, bytes], None], dict[str, int]] = {
    every_length: {"cut short": 1482, "made longer": 4},
    every_bit: {"one bit flipped": 9000},
    lies_about_the_length_of_the_header: {"another length of the header": 312},
    bytes_of_chance: {"random bytes": 300, "bytes replaced": 600, "bytes left out": 600},
    any_json: {"any JSON as the header": 400},
    nesting: {"deep nesting": 9},
    any_json_in_the_place_of_a_part: {"any JSON in the place of a part of the header": 400},
    headers_that_lie_under_a_right_checksum: {
        "another dtype": 123,
        "another shape": 121,
        "other offsets": 113,
        "another layout": 126,
        "another size of a layer": 148,
        "another version": 124,
        "two tensors swapped": 168,
        "an entry left out": 138,
        "an entry renamed": 139,
    },
    tensors_that_lie_under_right_checksums: {"one bit of an index or a row_ptr flipped": 752},
}


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.__name__)
def test_a_changed_file_gives_one_sentence_or_usable_weights(
    trial: Callable[[Fuzz, bytes], None], fuzz: Fuzz, content: bytes
) -> None:
    trial(fuzz, content)
    assert fuzz.tried == TRIALS[trial]


def test_enough_is_tried_and_told() -> None:
    tried = [(kind, count) for kinds in TRIALS.values() for kind, count in kinds.items()]
    total = sum(count for _, count in tried)
    assert total >= 10_000
    assert len(tried) >= 15
    document = (Path(__file__).parents[2] / "docs" / "fuzzing.md").read_text()
    told = re.findall(r"^\| ([^|]+) \| ([\d,]+) \|$", document, re.MULTILINE)
    *rows, (_, whole) = [(name, int(count.replace(",", ""))) for name, count in told]
    assert whole == total
    assert [count for _, count in rows] == [count for _, count in tried]
    assert all(name.startswith(kind) for (name, _), (kind, _) in zip(rows, tried, strict=True))
