import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from perp import models
from perp.errors import UserError

from . import families, tiny

SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_dir(tmp_path_factory.mktemp("models"))


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A model directory that a test may damage."""
    path = tmp_path / "model"
    path.mkdir()
    for file in saved.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def edit(path: Path, **changes: Any) -> None:
    settings = json.loads((path / "config.json").read_text())
    settings.update(changes)
    (path / "config.json").write_text(json.dumps(settings))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(path / models.WEIGHTS).items()}


def with_tokenizer(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def test_loads_what_was_saved(saved: Path) -> None:
    model, tokenizer = models.load(str(saved))
    assert not model.training
    expected = load_file(saved / models.WEIGHTS)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    assert tokenizer("the river runs")["input_ids"] == tiny.tokenizer()("the river runs")["input_ids"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_the_checkpoints_own_unless_given(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tiny.model_dir(tmp_path, dtype=dtype)
    assert models.load(str(path))[0].dtype == dtype
    assert models.load(str(path), dtype=torch.float32)[0].dtype == torch.float32
    assert models.load(str(path), dtype="bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_every_family_passes_the_checks(tmp_path: Path, family: str) -> None:
    models.load(str(tiny.model_dir(tmp_path, family)))


def test_shards_load(saved: Path, tmp_path: Path) -> None:
    whole, tokenizer = models.load(str(saved))
    whole.save_pretrained(tmp_path, max_shard_size="10KB")
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / models.INDEX).is_file()
    model, _ = models.load(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def pickled(path: Path) -> None:
    torch.save(weights(path), path / "pytorch_model.bin")
    (path / models.WEIGHTS).unlink()


def truncated(path: Path) -> None:
    content = (path / models.WEIGHTS).read_bytes()
    (path / models.WEIGHTS).write_bytes(content[: len(content) // 2])


def empty(path: Path) -> None:
    (path / models.WEIGHTS).write_bytes(b"")


def missing_shard(path: Path) -> None:
    tensors = weights(path)
    (path / models.WEIGHTS).rename(path / "model-00001-of-00002.safetensors")
    shards = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    shards[next(iter(shards))] = "model-00002-of-00002.safetensors"
    (path / models.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def missing_tensor(path: Path) -> None:
    tensors = weights(path)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, path / models.WEIGHTS, metadata={"format": "pt"})


def value(number: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = weights(path)
        tensors["model.layers.1.self_attn.k_proj.weight"][1, 2] = number
        save_file(tensors, path / models.WEIGHTS, metadata={"format": "pt"})

    return damage


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_text(content) and None


def settings(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit(path, **changes)


@pytest.mark.parametrize(
    "damage,message",
    [
        (remove("config.json"), r"has no config\.json"),
        (text("config.json", "{half"), "not valid JSON"),
        (remove(models.WEIGHTS), "has no weights"),
        (pickled, r"only pickled weights \(pytorch_model\.bin\)"),
        (truncated, "truncated or damaged"),
        (empty, "truncated or damaged"),
        (missing_shard, r"lacks model-00002-of-00002\.safetensors, which model\.safetensors\.index\.json names"),
        (text(models.INDEX, "[]"), "not a valid index"),
        (settings(model_type="zzz"), "'zzz', unknown to this transformers"),
        (settings(model_type=None), "has no model_type"),
        (settings(model_type="zzz", auto_map={"AutoConfig": "code.Config"}), "code of its own; pass trust_remote_code"),
        (settings(quantization_config={"quant_method": "gptq"}), "quantised"),
        (settings(is_encoder_decoder=True), "encoder-decoder"),
        (settings(architectures=["LlamaForSequenceClassification"]), "saved as LlamaForSequenceClassification"),
        (settings(num_attention_heads="many"), r"config\.json of .* is not usable"),
    ],
)
def test_refused_before_any_weight_is_read(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(UserError, match=message) as caught:
        models.check_model(str(copy))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "damage,message",
    [
        (missing_tensor, r"lacks 1 of its weights, such as model\.layers\.0\.mlp\.down_proj\.weight"),
        (value(float("nan")), r"model\.layers\.1\.self_attn\.k_proj\.weight of .* holds NaN or infinite"),
        (value(float("inf")), r"model\.layers\.1\.self_attn\.k_proj\.weight of .* holds NaN or infinite"),
        (settings(hidden_size=48), "cannot be loaded"),
        (remove("tokenizer.json"), "no usable tokenizer"),
    ],
)
def test_refused_while_loading(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(UserError, match=message) as caught:
        models.load(str(copy))
    assert "\n" not in str(caught.value)


def test_values_too_large_for_the_dtype(copy: Path) -> None:
    value(1e6)(copy)
    models.load(str(copy))
    with pytest.raises(UserError, match=r"as torch\.float16; use an undamaged checkpoint or a wider dtype"):
        models.load(str(copy), dtype=torch.float16)


@pytest.mark.parametrize("name", ["/no/such/place", "./no-such", "a/b/c", "no such model"])
def test_paths_that_do_not_exist(name: str) -> None:
    with pytest.raises(UserError, match=f"there is no directory {name}"):
        models.load(name)


def test_a_file_is_not_a_directory(saved: Path) -> None:
    with pytest.raises(UserError, match="is a file; give the directory"):
        models.load(str(saved / models.WEIGHTS))


def test_hub_id_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="nobody/nothing is neither a directory here nor a model") as caught:
        models.load("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_encoder_only(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=300, **SMALL)
    masked = with_tokenizer(transformers.BertForMaskedLM(config), tmp_path / "masked")
    with pytest.raises(UserError, match="saved as BertForMaskedLM"):
        models.check_model(str(masked))
    # Under a causal class name only behaviour tells: every token still sees all others.
    headed = with_tokenizer(transformers.BertLMHeadModel(config), tmp_path / "headed")
    models.check_model(str(headed))
    with pytest.raises(UserError, match="later tokens change earlier predictions"):
        models.load(str(headed))
    config.is_decoder = True
    models.load(str(with_tokenizer(transformers.BertLMHeadModel(config), tmp_path / "decoder")))


def test_encoder_decoder(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    path = with_tokenizer(transformers.T5ForConditionalGeneration(config), tmp_path)
    with pytest.raises(UserError, match="encoder-decoder model; give a decoder-only"):
        models.check_model(str(path))


def test_not_a_language_model(tmp_path: Path) -> None:
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SMALL)
    path = with_tokenizer(transformers.ViTForImageClassification(config), tmp_path)
    with pytest.raises(UserError, match="not a language model that generates text"):
        models.check_model(str(path))


def test_silence_is_scoped(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.load(str(saved))
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    with models.quiet():
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
