from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from perp import data
from perp.data import Documents, documents, sample, split, training_windows, windows
from perp.errors import UserError

from . import tiny


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def parquet(path: Path, columns: dict) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    return path


def test_every_kind_of_file_gives_its_texts(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        '{"text": "three\\u2028"}\n\n{"text": "four", "id": 7}\n{"text": " "}\n', encoding="utf-8"
    )
    parquet(tmp_path / "c.parquet", {"text": ["five", None, "six"]})
    (tmp_path / "notes.csv").write_text("not,read\n")
    assert documents(tmp_path / "a.txt").texts == ["one\n\ntwo\n"]
    assert documents(tmp_path / "b.jsonl").texts == ["three\u2028", "four", " "]
    assert documents(tmp_path / "c.parquet").texts == ["five", "six"]
    assert documents(tmp_path).texts == ["one\n\ntwo\n", "three\u2028", "four", " ", "five", "six"]


def test_a_raw_line_separator_inside_a_json_string_does_not_end_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "up\u2028down"}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert documents(path).texts == ["up\u2028down"]


def bad_inputs(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    files = {
        "empty.txt": (b"", "is empty"),
        "blank.jsonl": (b"\n\n", "is empty"),
        "nul.txt": (b"ab\0c", "NUL byte at offset 2"),
        "image.txt": (b"PNG\x89\xff", "not UTF-8 text: the byte at offset 3"),
        "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"line 2 of .* is not JSON"),
        "field.jsonl": (b'{"content": "a"}\n', r'line 1 of .* has no field "text"'),
        "list.jsonl": (b'["text"]\n', r'line 1 of .* has no field "text"'),
        "number.jsonl": (b'{"text": 3}\n', r'line 1 of .* has no field "text"'),
        "table.csv": (b"text\nhello\n", r"none of the kinds .* \.txt, \.jsonl, \.parquet"),
        "fake.parquet": (b"hello", "not a parquet file"),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    return {name: (tmp_path / name, message) for name, (_, message) in files.items()}


def test_bad_files_get_a_sentence_of_their_own(tmp_path):
    for path, message in bad_inputs(tmp_path).values():
        with pytest.raises(UserError, match=message):
            documents(path)


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    with pytest.raises(UserError, match=r'no column "text": its columns are title, body'):
        documents(parquet(tmp_path / "a.parquet", {"title": ["x"], "body": ["y"]}))
    with pytest.raises(UserError, match="holds int, not strings"):
        documents(parquet(tmp_path / "b.parquet", {"text": [1, 2]}))


@pytest.mark.parametrize("source", ["nowhere.txt", "./nowhere", "/no/such/file.jsonl", "~/no-such-directory", "a b"])
def test_a_source_that_is_not_there(source):
    with pytest.raises(UserError, match="there is no text at"):
        documents(source)


def test_a_directory_without_text(tmp_path):
    with pytest.raises(UserError, match="holds no"):
        documents(tmp_path)


def test_a_data_set_that_cannot_be_reached(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing:test is no file here and cannot be loaded"):
        documents("nobody/nothing:test")


@pytest.mark.parametrize(
    "name, parts",
    [
        ("c4", ("c4", None, None)),
        ("owner/name", ("owner/name", None, None)),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name/config-v1:validation", ("owner/name", "config-v1", "validation")),
    ],
)
def test_data_set_names(name, parts):
    found = data._HUB_NAME.fullmatch(name)
    assert found is not None
    assert (found["path"], found["config"], found["split"]) == parts


def test_identity_tells_texts_apart_that_join_alike():
    one = Documents("x", ["ab", "c"]).identity
    two = Documents("x", ["a", "bc"]).identity
    assert one["sha256"] != two["sha256"]
    assert one["count"] == two["count"] == 2
    assert one == Documents("x", ["ab", "c"]).identity


@pytest.mark.parametrize(
    "name, label",
    [
        ("demo:wiki", "wiki"),
        ("/data/c4.v2.jsonl", "c4.v2"),
        ("texts/", "texts"),
        ("owner/name/config:test", "config:test"),
        ("notes.d", "notes.d"),
    ],
)
def test_labels_are_short(name, label):
    assert Documents(name, []).label == label


def test_windows_of_documents_lie_within_one_and_short_ones_give_none():
    words, seqlen = tiny.tokenizer(), 96
    texts = [tiny.article(number, sentences=1 + number % 6) for number in range(30)]
    ids = [words(text, add_special_tokens=False)["input_ids"] for text in texts]
    long = [own for own in ids if len(own) > seqlen]
    assert 0 < len(long) < len(ids)

    found = data.document_windows(words, texts, seqlen, count=2 * len(long), seed=3)
    assert found.shape == (2 * len(long), seqlen)
    places = {tuple(own[i : i + seqlen]): number for number, own in enumerate(long) for i in range(len(own) - seqlen)}
    drawn = [places[tuple(window.tolist())] for window in found]
    assert sorted(drawn[: len(long)]) == sorted(drawn[len(long) :]) == list(range(len(long)))
    assert found.equal(data.document_windows(words, texts, seqlen, 2 * len(long), seed=3))
    assert not found.equal(data.document_windows(words, texts, seqlen, 2 * len(long), seed=4))
    with pytest.raises(UserError, match="none of 30 documents is longer"):
        data.document_windows(words, texts, max(map(len, ids)), 1, seed=0)


def test_split_deals_documents_by_their_number():
    texts = [str(number) for number in range(100)]
    parts = split(Documents("x", texts))
    assert parts.by == "document"
    assert parts.test == ["0", "20", "40", "60", "80"]
    assert parts.validation == ["10", "30", "50", "70", "90"]
    assert parts.train == [text for text in texts if int(text) % 10 != 0]
    assert sorted(parts.part("all")) == sorted(texts)


def test_split_leaves_the_first_train_documents_where_they_are():
    texts = [str(number) for number in range(100)]
    parts = split(Documents("x", texts, fixed_train=50))
    assert parts.train[:50] == [text for text in texts if int(text) % 20 != 0][:50]
    assert parts.validation == ["70", "90"]
    assert len(parts.train) + len(parts.validation) + len(parts.test) == 100


def test_few_documents_are_split_by_paragraph():
    document = "\n\n".join(f"paragraph {number}" for number in range(40))
    parts = split(Documents("x", [document]))
    assert parts.by == "paragraph"
    assert parts.test == ["paragraph 0", "paragraph 20"]
    assert parts.validation == ["paragraph 10", "paragraph 30"]
    assert len(parts.train) == 36


def test_the_last_resort_is_by_position():
    text = " ".join(str(number) for number in range(1000))
    parts = split(Documents("x", [text]))
    assert parts.by == "position"
    numbers = [[int(word) for word in part[0].split()] for part in (parts.train, parts.validation, parts.test)]
    assert numbers[0] + numbers[1] + numbers[2] == list(range(1000))
    assert all(len(part) > 80 for part in numbers)


def test_windows_are_consecutive_tokens_of_the_joined_text(tokenizer):
    texts = tiny.articles(5)
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    found = windows(tokenizer, texts, 32)
    assert found.dtype == torch.int64
    assert found.flatten().tolist() == ids[: len(ids) // 32 * 32]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_first_windows_are_those_of_the_whole_text(tokenizer, count, monkeypatch):
    texts = tiny.articles(60)
    assert torch.equal(windows(tokenizer, texts, 16, count), windows(tokenizer, texts, 16)[:count])
    # Even where the first guess reads far too little.
    monkeypatch.setattr(data, "_documents_for", lambda texts, characters: 1)
    assert torch.equal(windows(tokenizer, texts, 16, count), windows(tokenizer, texts, 16)[:count])


def test_asking_for_more_windows_than_there_are_gives_all(tokenizer):
    texts = tiny.articles(2)
    assert torch.equal(windows(tokenizer, texts, 16, 10_000), windows(tokenizer, texts, 16))


def test_too_little_text_says_how_much_there_was(tokenizer):
    text = tiny.article(0)
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    with pytest.raises(UserError, match=rf"{tokens} tokens where a window takes 4096; .*at most {tokens} "):
        windows(tokenizer, [text], 4096)
    with pytest.raises(UserError, match=r"0 tokens where a window takes 8; give more text$"):
        windows(tokenizer, [], 8, 2)


def test_training_windows_read_on_until_there_are_enough(tokenizer, monkeypatch):
    texts = tiny.articles(60)
    monkeypatch.setattr(data, "FIRST_DOCUMENTS", 3)
    first = training_windows(tokenizer, texts, 16, enough=1)
    assert torch.equal(first, windows(tokenizer, texts[:3], 16))
    more = training_windows(tokenizer, texts, 16, enough=3 * len(first))
    assert len(more) >= 3 * len(first)
    assert len(more) < len(windows(tokenizer, texts, 16))
    assert torch.equal(training_windows(tokenizer, texts, 16, enough=10**6), windows(tokenizer, texts, 16))


def test_sample_draws_by_seed_without_repetition():
    rows = torch.arange(20).view(20, 1)
    drawn = sample(rows, 8, seed=3)
    expected = torch.randperm(20, generator=torch.Generator().manual_seed(3))[:8]
    assert drawn.flatten().tolist() == expected.tolist()
    assert sorted(sample(rows, 99, seed=0).flatten().tolist()) == list(range(20))
