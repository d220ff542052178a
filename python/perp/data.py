"""Text: documents from anywhere, split so that no article is in two parts, cut into windows of tokens."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perp import demo
from perp.errors import UserError

if TYPE_CHECKING:
    import torch

SEPARATOR = "\n\n"
# Text read at first for training: 2,000 documents or 16 million characters, doubled while windows are too few.
FIRST_DOCUMENTS = 2000
FIRST_CHARACTERS = 16_000_000
# A hub data set may be terabytes: reading stops here.
HUB_DOCUMENTS = 100_000
_EVERY, _TEST, _VALIDATION = 20, 0, 10
_HUB_NAME = re.compile(r"(?P<path>[\w.-]+(?:/[\w.-]+)?)(?:/(?P<config>[\w.-]+))?(?::(?P<split>\w+))?")


@dataclass(frozen=True)
class Documents:
    """Texts of one source, in a fixed order.

    Blank ones are among them, since published perplexities join every row of a data set. `fixed_train` is the number of
    train documents, from the first, that `split` never moves to validation.
    """

    name: str
    texts: list[str]
    fixed_train: int = 0

    @property
    def label(self) -> str:
        """A short name for tables: the last part of the path or of the data set's name, without its suffix."""
        last = self.name.rstrip("/").rpartition("/")[2].removeprefix("demo:")
        return last.removesuffix(Path(last).suffix) if Path(last).suffix in _READERS else last

    @property
    def identity(self) -> dict[str, str | int]:
        """What a manifest records: the name, the sha256 over all texts in order, and their count."""
        digest = hashlib.sha256()
        for text in self.texts:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return {"name": self.name, "sha256": digest.hexdigest(), "count": len(self.texts)}


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of one source; `by` says what was kept whole: "document", "paragraph" or "position"."""

    train: list[str]
    validation: list[str]
    test: list[str]
    by: str

    def part(self, name: str) -> list[str]:
        """The texts of "train", "validation", "test", or "all" of them."""
        return self.train + self.validation + self.test if name == "all" else getattr(self, name)


def documents(source: str | Path) -> Documents:
    """Read a .txt, .jsonl or .parquet file, a directory of them, a `datasets` name or the packaged text.

    `source` is a path; "demo" (also "demo:wiki") or "demo:sotu"; or "name", "owner/name" or "owner/name/config", with
    ":split" behind it where another split than train is meant. A .txt file is one document; a .jsonl line holds one in
    its field "text", a .parquet row in its column "text". Raises UserError, in one sentence, for anything unreadable.
    """
    source = str(source)
    if source in ("demo", "demo:wiki"):
        # The published protocol calibrates and trains on the first 2,000 train articles: those stay as they are.
        return Documents("demo:wiki", demo.wiki(), fixed_train=FIRST_DOCUMENTS)
    if source == "demo:sotu":
        return Documents("demo:sotu", demo.sotu())
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in _READERS)
        if not files:
            raise UserError(f"{path} holds no {_SUFFIXES} file to read text from")
        texts = [text for file in files for text in _read(file)]
    elif path.is_file():
        texts = _read(path)
    elif path.suffix in _READERS or source.startswith((".", "/", "~")) or not (hub := _HUB_NAME.fullmatch(source)):
        raise UserError(
            f"there is no text at {source}: give a {_SUFFIXES} file, a directory, a datasets name or 'demo'"
        )
    else:
        texts = _from_hub(source, hub["path"], hub["config"], hub["split"] or "train")
    if not any(text.strip() for text in texts):
        raise UserError(f"{source} is empty: it holds no text at all")
    return Documents(source, texts)


def split(source: Documents) -> Split:
    """Of the documents that are not blank every 20th is test, the tenth after each of those validation, the rest train.

    With fewer than 20 documents their paragraphs take the documents' place; with fewer than 20 paragraphs the joined
    text is cut by position: 80 % train, then 10 % validation, then 10 % test.
    """
    texts = [text for text in source.texts if text.strip()]
    if len(texts) >= _EVERY:
        return Split(*_deal(texts, source.fixed_train), by="document")
    paragraphs = [part for text in texts for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(paragraphs) >= _EVERY:
        return Split(*_deal(paragraphs, 0), by="paragraph")
    text = SEPARATOR.join(texts)
    first, second = (_space_after(text, len(text) * tenths // 10) for tenths in (8, 9))
    parts = text[:first], text[first:second], text[second:]
    train, validation, test = ([part] if part.strip() else [] for part in parts)
    return Split(train, validation, test, by="position")


def windows(tokenizer: Any, texts: Sequence[str], seqlen: int, count: int | None = None) -> torch.Tensor:
    """Consecutive windows int64 [n, seqlen] of the texts joined by a blank line, tokenised without special tokens.

    With `count`, the first `count` of them, and little more text than that is tokenised; fewer where the text ends.
    Raises UserError where there is too little text for one window.
    """
    read = len(texts) if count is None else _documents_for(texts, 8 * count * seqlen)
    ids = _tokens(tokenizer, texts[:read])
    # One window more than asked for: the tokens beside a cut may differ from those of the whole text.
    while count is not None and read < len(texts) and len(ids) < (count + 1) * seqlen:
        read *= 2
        ids = _tokens(tokenizer, texts[:read])
    return _cut(ids, seqlen)[:count]


def training_windows(tokenizer: Any, texts: Sequence[str], seqlen: int, enough: int) -> torch.Tensor:
    """Windows [n, seqlen] to draw calibration and training samples from: those of the first 2,000 documents.

    More documents are read where these give fewer than `enough` windows, fewer where they are very long.
    """
    read = min(FIRST_DOCUMENTS, _documents_for(texts, FIRST_CHARACTERS))
    ids = _tokens(tokenizer, texts[:read])
    while read < len(texts) and len(ids) < enough * seqlen:
        read *= 2
        ids = _tokens(tokenizer, texts[:read])
    return _cut(ids, seqlen)


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    return tokenizer(SEPARATOR.join(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _cut(ids: list[int], seqlen: int) -> torch.Tensor:
    import torch

    count = len(ids) // seqlen
    if not count:
        advice = f"give more text or windows of at most {len(ids)} (--seqlen)" if len(ids) > 1 else "give more text"
        raise UserError(f"too little text for one window: {len(ids)} tokens where a window takes {seqlen}; {advice}")
    return torch.tensor(ids[: count * seqlen], dtype=torch.int64).view(count, seqlen)


def sample(windows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` of the windows drawn without repetition (all of them, shuffled, where there are fewer)."""
    import torch

    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


def document_windows(tokenizer: Any, texts: Sequence[str], seqlen: int, count: int, seed: int) -> torch.Tensor:
    """`count` windows int64 [count, seqlen], each a random stretch of a random text that is longer than that.

    So do the codes of SparseGPT, Wanda and PERP draw, each text tokenised by itself. Here no text is drawn twice before
    all were; UserError where none is long enough.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    found: list[torch.Tensor] = []
    while len(found) < count:
        before = len(found)
        for index in torch.randperm(len(texts), generator=generator).tolist():
            # No token is shorter than a byte.
            if len(found) == count or len(texts[index].encode()) <= seqlen:
                continue
            ids = _tokens(tokenizer, texts[index : index + 1])
            if len(ids) > seqlen:
                first = int(torch.randint(len(ids) - seqlen, (), generator=generator))
                found.append(torch.tensor(ids[first : first + seqlen]))
        if len(found) == before:
            raise UserError(
                f"none of {len(texts)} documents is longer than a window of {seqlen} tokens, to be drawn from; give "
                "shorter windows (--seqlen), or longer documents, or draw from the joined text (--calibration joined)."
            )
    return torch.stack(found)


def _documents_for(texts: Sequence[str], characters: int) -> int:
    total = 0
    for index, text in enumerate(texts):
        total += len(text) + len(SEPARATOR)
        if total >= characters:
            return index + 1
    return len(texts)


def _deal(items: Sequence[str], fixed_train: int) -> tuple[list[str], list[str], list[str]]:
    train: list[str] = []
    validation: list[str] = []
    test: list[str] = []
    for index, item in enumerate(items):
        if index % _EVERY == _TEST:
            test.append(item)
        elif index % _EVERY == _VALIDATION and len(train) >= fixed_train:
            validation.append(item)
        else:
            train.append(item)
    return train, validation, test


def _space_after(text: str, position: int) -> int:
    space = re.compile(r"\s").search(text, position)
    return space.start() if space else position


def _read(path: Path) -> list[str]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise UserError(f"{path} is none of the kinds of file text is read from: {_SUFFIXES}")
    try:
        return reader(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: the byte at offset {error.start} is none of it") from error
    if "\0" in text:
        raise UserError(f"{path} is binary data, not text: there is a NUL byte at offset {content.index(0)}")
    return text


def _read_txt(path: Path) -> list[str]:
    return [_text(path)]


def _read_jsonl(path: Path) -> list[str]:
    return list(_jsonl(path))


def _jsonl(path: Path) -> Iterator[str]:
    # split("\n"), not splitlines: JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"line {number} of {path} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UserError(f'line {number} of {path} has no field "text" holding a string')
        yield record["text"]


def _read_parquet(path: Path) -> list[str]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"reading {path} needs pyarrow: pip install 'perp[data]'")
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        column = file.read(columns=["text"]).column("text").to_pylist() if "text" in names else []
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a parquet file that can be read: {error}") from error
    if "text" not in names:
        raise UserError(f'{path} has no column "text": its columns are {", ".join(names)}')
    if wrong := next((value for value in column if not isinstance(value, str | None)), None):
        raise UserError(f'the column "text" of {path} holds {type(wrong).__name__}, not strings')
    return [value for value in column if value is not None]


_READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
_SUFFIXES = ", ".join(_READERS)


def _from_hub(source: str, path: str, config: str | None, split: str) -> list[str]:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"{source} is no file here, and reading it as a data set needs: pip install 'perp[data]'")
    import datasets
    import huggingface_hub

    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            rows = datasets.load_dataset(path, config, split=split)
        else:
            # One request first, since the library itself would try an unreachable host for half a minute.
            huggingface_hub.HfApi().dataset_info(path, timeout=10)
            rows = datasets.load_dataset(path, config, split=split, streaming=True)
        texts = [row.get("text") for row in itertools.islice(rows, HUB_DOCUMENTS)]
    # The library raises a different class for every way a name can be wrong or a host unreachable.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source} is no file here and cannot be loaded as a data set ({reason or type(error).__name__}): "
            "check the name and the network, or give a file"
        ) from error
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f'the data set {source} has no column "text" of strings')
    return texts
