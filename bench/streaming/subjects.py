"""The models: random weights in the shapes of real ones, a shard for each block, so that one is in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedConfig

from perp import demo, models

DEVIATION = 0.02
# So many numbers are drawn, and every tensor is made of them, over and over: those of a 405B block would take a minute.
# A prime, so that no two rows of a weight are alike.
DRAWN = 4_194_301
# Beside the blocks little is needed of a model that is only pruned.
VOCABULARY = 4096
TINY: dict[str, Any] = {"windows": 2, "seqlen": 16, "epochs": 1, "memory": None, "seconds": None, "rate": None}


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


def _opt(hidden: int, heads: int, blocks: int, vocabulary: int = VOCABULARY) -> OPTConfig:
    return OPTConfig(
        vocab_size=vocabulary,
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
    """A shape with its real number of blocks, what is done to it, and what its rows are held to.

    `measured`: the numbers of blocks that are run, each in a process of its own; all of them where it is empty. It is
    pruned with `method` to 2:4 and fitted to `windows` of `seqlen` tokens; where `steps` are given it is retrained for
    so many instead, of one window each. `timed`: the time of all blocks is told. `memory`: bytes at the peak;
    `seconds`: of all blocks; `rate`: tokens per second of retraining. `tiny`: the configuration to rehearse with.
    """

    name: str
    config: Callable[[int], PreTrainedConfig]
    blocks: int
    windows: int
    seqlen: int
    method: str = "wanda"
    epochs: int = 3
    measured: tuple[int, ...] = ()
    steps: int = 0
    timed: bool = False
    memory: float | None = None
    seconds: float | None = None
    rate: float | None = None
    gpu: bool = False
    tiny: Callable[[int], PreTrainedConfig] | None = None

    def rehearsed(self) -> Subject:
        """The same at a size that a CPU does in a moment, held to nothing."""
        assert self.tiny
        return replace(self, name=f"{self.name} (tiny)", config=self.tiny, gpu=False, **TINY)


def write_random(config: PreTrainedConfig, out: Path) -> None:
    """A model directory of this configuration without tokenizer."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items() if not _tied(skeleton, name)}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(name.partition(".layers.")[2].partition(".")[0], []).append(name)
    numbers = Numbers(config.dtype)
    places: dict[str, str] = {}
    for number, names in enumerate(shards.values(), start=1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: numbers.tensor(shapes[name], name) for name in names}, out / shard, {"format": "pt"})
        places |= dict.fromkeys(names, shard)
    (out / models.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.save_pretrained(out)


def _tied(model: Any, name: str) -> bool:
    return model.config.tie_word_embeddings and name == "lm_head.weight"


class Numbers:
    """Normal numbers, the same in every process, handed out in a circle."""

    def __init__(self, dtype: torch.dtype) -> None:
        drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0))
        self._drawn, self._next = (DEVIATION * drawn).to(dtype), 0

    def tensor(self, shape: torch.Size, name: str) -> Tensor:
        """A weight of these numbers; norms are 1 and biases 0."""
        if len(shape) == 1:
            return torch.full(shape, float(not name.endswith("bias")), dtype=self._drawn.dtype)
        flat = torch.empty(math.prod(shape), dtype=self._drawn.dtype)
        filled = 0
        while filled < len(flat):
            piece = self._drawn[self._next : self._next + len(flat) - filled]
            flat[filled : filled + len(piece)] = piece
            filled, self._next = filled + len(piece), (self._next + len(piece)) % DRAWN
        return flat.view(shape)


def demo_directory() -> Path:
    return demo.model_dir()


def _tiny_opt(blocks: int) -> OPTConfig:
    return _opt(64, 4, blocks, 96)


def _tiny_llama(blocks: int) -> LlamaConfig:
    return _llama(64, 128, 4, 2, blocks, 96)


def _opt_30b(blocks: int) -> OPTConfig:
    return _opt(7168, 56, blocks)


# Time is told of three blocks: the first has the kernels compiled, and the last passes nothing on. What a GPU holds at
# the peak it holds in one block, one epoch and a few windows, too: the states of the others wait in memory.
SUBJECTS = {
    "1.1b": Subject("Llama-1.1B", lambda blocks: _llama(2048, 5632, 32, 4, blocks, 32000), 22, 16, 512, memory=700e6),
    "30b": Subject(
        "OPT-30B",
        _opt_30b,
        48,
        128,
        2048,
        measured=(3,),
        timed=True,
        memory=8e9,
        seconds=720,
        gpu=True,
        tiny=_tiny_opt,
    ),
    "30b-retrain": Subject(
        "OPT-30B",
        lambda blocks: _opt(7168, 56, blocks, 50272),
        48,
        1,
        2048,
        "magnitude",
        measured=(1, 3),
        steps=8,
        memory=40e9,
        rate=1500,
        gpu=True,
        tiny=_tiny_opt,
    ),
    "30b-sparsegpt": Subject(
        "OPT-30B",
        _opt_30b,
        48,
        128,
        2048,
        "sparsegpt",
        epochs=1,
        measured=(1,),
        memory=16e9,
        gpu=True,
        tiny=_tiny_opt,
    ),
    "70b": Subject(
        "LLaMA-2-70B",
        lambda blocks: _llama(8192, 28672, 64, 8, blocks),
        80,
        128,
        2048,
        epochs=1,
        measured=(1,),
        memory=12e9,
        gpu=True,
        tiny=_tiny_llama,
    ),
    "405b": Subject(
        "LLaMA-3.1-405B",
        lambda blocks: _llama(16384, 53248, 128, 8, blocks),
        126,
        16,
        2048,
        epochs=1,
        measured=(1,),
        memory=40e9,
        gpu=True,
        tiny=_tiny_llama,
    ),
}
