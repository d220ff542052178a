"""The jobs: small models of random weights, of several families, with a tokenizer and a text of made-up words."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers as t
from tokenizers import Tokenizer, models, pre_tokenizers

from bench.streaming.subjects import write_random

WORDS = 2000
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Subject:
    """A model's configuration and what `perp run` is told.

    `seen`: the plan was fitted with a look at this job; the others were written down first and measured afterwards.
    """

    config: Callable[[], t.PreTrainedConfig]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seen: bool = False


def directory(name: str, subject: Subject, cache: Path) -> Path:
    """The model and its text, made on the first call; an interruption leaves nothing there."""
    target = cache / f"plan-{name}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
        try:
            write_random(subject.config(), staging)
            _words().save_pretrained(staging)
            _write_text(staging / "text.jsonl")
            staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _words() -> t.PreTrainedTokenizerFast:
    known = {name: number for number, name in enumerate(["<pad>", "<bos>", "<eos>", *_vocabulary()])}
    words = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return t.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def _vocabulary() -> list[str]:
    return [f"w{number}" for number in range(WORDS - 3)]


def _write_text(path: Path) -> None:
    draw, words = random.Random(0), _vocabulary()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(400):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=100))}) + "\n")


def _config(kind: type[t.PreTrainedConfig], **settings: Any) -> Callable[[], t.PreTrainedConfig]:
    return lambda: kind(
        **{
            "vocab_size": 8192,
            "max_position_embeddings": 1024,
            "architectures": [kind.__name__.replace("Config", "ForCausalLM")],
            **_SPECIAL,
            **settings,
        }
    )


SUBJECTS = {
    "llama-fp32": Subject(
        _config(
            t.LlamaConfig,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=4,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            dtype="float32",
        ),
        {"pattern": "0.5", "epochs": 1, "checkpointing": False, "steps": 4, "batch": 1},
        seen=True,
    ),
    "llama-bf16-streamed": Subject(
        _config(
            t.LlamaConfig,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=4,
            num_attention_heads=12,
            num_key_value_heads=12,
            tie_word_embeddings=False,
            dtype="bfloat16",
        ),
        {"pattern": "2:4", "stream": True, "steps": 2, "batch": 1},
        seen=True,
    ),
    "opt-sparsegpt": Subject(
        _config(
            t.OPTConfig,
            hidden_size=512,
            ffn_dim=2048,
            word_embed_proj_dim=512,
            num_hidden_layers=5,
            num_attention_heads=8,
            dtype="float32",
        ),
        {"pattern": "0.6", "method": "sparsegpt", "steps": 3, "batch": 1, "epochs": 2},
        seen=True,
    ),
    "neox-parallel": Subject(
        _config(
            t.GPTNeoXConfig,
            hidden_size=640,
            intermediate_size=2560,
            num_hidden_layers=3,
            num_attention_heads=10,
            use_parallel_residual=True,
            dtype="float32",
        ),
        {"pattern": "0.5", "steps": 2, "batch": 1, "compare": ("pruned", "dense-retrained")},
        seen=True,
    ),
    "qwen3-bf16-streamed": Subject(
        _config(
            t.Qwen3Config,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=3,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=64,
            tie_word_embeddings=True,
            dtype="bfloat16",
        ),
        {"pattern": "2:4", "stream": True, "steps": 2, "batch": 1, "seqlen": 384, "windows": 2},
        seen=True,
    ),
    "gemma2-adapters": Subject(
        _config(
            t.Gemma2Config,
            hidden_size=448,
            intermediate_size=1792,
            num_hidden_layers=4,
            num_attention_heads=7,
            num_key_value_heads=7,
            head_dim=64,
            sliding_window=128,
            dtype="float32",
        ),
        {"pattern": "0.7", "reconstruct_parts": ("mask_lora", "norms"), "steps": 3, "batch": 1, "rank": 8},
        seen=True,
    ),
    "mistral-best": Subject(
        _config(
            t.MistralConfig,
            hidden_size=640,
            intermediate_size=1792,
            num_hidden_layers=4,
            num_attention_heads=10,
            num_key_value_heads=5,
            sliding_window=128,
            dtype="float32",
        ),
        {"pattern": "2:4", "method": "sparsegpt", "distil": 0.5, "precision": "bf16", "steps": 3, "batch": 2},
    ),
    "qwen2-moe": Subject(
        _config(
            t.Qwen2MoeConfig,
            hidden_size=384,
            intermediate_size=1024,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=768,
            num_experts=8,
            num_experts_per_tok=2,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=6,
            dtype="float32",
        ),
        {"pattern": "0.5", "steps": 3, "batch": 1},
    ),
    "bloom-cycles": Subject(
        _config(t.BloomConfig, hidden_size=512, n_layer=4, n_head=8, dtype="float32"),
        {"pattern": "0.6", "cycles": 2, "steps": 4, "batch": 1},
        seen=True,
    ),
    "phi-bf16-streamed": Subject(
        _config(
            t.PhiConfig,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=3,
            num_attention_heads=12,
            dtype="bfloat16",
        ),
        {"pattern": "0.5", "stream": True, "steps": 2, "batch": 1},
        seen=True,
    ),
    "starcoder2-cycles": Subject(
        _config(
            t.Starcoder2Config,
            hidden_size=576,
            intermediate_size=2304,
            num_hidden_layers=4,
            num_attention_heads=9,
            num_key_value_heads=3,
            dtype="float32",
        ),
        {"pattern": "0.6", "cycles": 3, "schedule": "linear", "steps": 3, "batch": 1},
    ),
    "olmo2-bf16-streamed": Subject(
        _config(
            t.Olmo2Config,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=3,
            num_attention_heads=16,
            num_key_value_heads=16,
            tie_word_embeddings=False,
            dtype="bfloat16",
        ),
        {"pattern": "2:4", "stream": True, "steps": 2, "batch": 1},
        seen=True,
    ),
}
