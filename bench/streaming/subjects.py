"""The models: random weights in the shapes of real ones, a shard for each block, so that one is in memory at a time."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedConfig

from perp import demo, models

DEVIATION = 0.02
# Beside the blocks little is needed, and a vocabulary of 128,000 would take longer to draw than a block to prune.
VOCABULARY = 4096


def _llama(hidden: int, inner: int, heads: int, groups: int, blocks: int, vocabulary: int = VOCABULARY) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def _opt(hidden: int, heads: int, blocks: int) -> OPTConfig:
    return OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        ffn_dim=4 * hidden,
        word_embed_proj_dim=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        dtype="bfloat16",
        architectures=["OPTForCausalLM"],
    )


@dataclass(frozen=True)
class Subject:
    """A shape with its real number of blocks, and what its rows are held to: bytes at the peak, seconds for all."""

    name: str
    config: Callable[[int], PreTrainedConfig]
    blocks: int
    windows: int
    seqlen: int
    method: str = "wanda"
    memory: float | None = None
    seconds: float | None = None
    gpu: bool = False

    def directory(self, cache: Path, blocks: int) -> Path:
        """Its directory with so many blocks, made on the first call; an interruption leaves nothing there."""
        target = cache / f"{self.name.lower()}-{blocks}"
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
            try:
                write_random(self.config(blocks), staging)
                staging.rename(target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        return target


def write_random(config: PreTrainedConfig, out: Path) -> None:
    """A model directory of this configuration without tokenizer."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items() if not _tied(skeleton, name)}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(name.partition(".layers.")[2].partition(".")[0], []).append(name)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    for number, names in enumerate(shards.values(), start=1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random(shapes[name], name, generator).to(config.dtype) for name in names}
        save_file(tensors, out / shard, {"format": "pt"})
        places |= dict.fromkeys(names, shard)
    (out / models.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.save_pretrained(out)


def _tied(model: Any, name: str) -> bool:
    return model.config.tie_word_embeddings and name == "lm_head.weight"


def _random(shape: torch.Size, name: str, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.full(shape, float(not name.endswith("bias")))
    return DEVIATION * torch.randn(shape, generator=generator)


def demo_directory() -> Path:
    return demo.model_dir()


SUBJECTS = {
    "1.1b": Subject("Llama-1.1B", lambda blocks: _llama(2048, 5632, 32, 4, blocks, 32000), 22, 16, 512, memory=700e6),
    "30b": Subject("OPT-30B", lambda blocks: _opt(7168, 56, blocks), 48, 128, 2048, memory=8e9, seconds=720, gpu=True),
    "30b-sparsegpt": Subject(
        "OPT-30B", lambda blocks: _opt(7168, 56, blocks), 48, 128, 2048, "sparsegpt", memory=16e9, gpu=True
    ),
    "70b": Subject(
        "LLaMA-2-70B", lambda blocks: _llama(8192, 28672, 64, 8, blocks), 80, 128, 2048, memory=12e9, gpu=True
    ),
    "405b": Subject(
        "LLaMA-3.1-405B", lambda blocks: _llama(16384, 53248, 128, 8, blocks), 126, 128, 2048, memory=40e9, gpu=True
    ),
}
