"""The models that generate, each pruned at 50 % by magnitude in each row, in bf16, with its packed file.

They are made once into a cache directory and found there again; how well they write is of no matter here.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import perp_kernels as pk
from perp import checkpoints, demo, manifest, models, packed
from perp.blocks import all_prunable

PATTERN = "0.5/row"
DEVIATION = 0.02
CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
)


@dataclass(frozen=True)
class Subject:
    """A model with its targets: tokens/s as a multiple, and resident memory as a share, of the faster dense peer's."""

    name: str
    make: Callable[[Path], None]
    speed: float
    memory: float

    def directory(self, cache: Path) -> Path:
        """Where it is, made on the first call; an interruption leaves nothing there."""
        target = cache / self.name.lower()
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{self.name}-", dir=cache))
            try:
                self.make(staging)
                staging.rename(target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        return target


def _small(out: Path) -> None:
    model, tokenizer = models.load("demo", torch.bfloat16)
    masks = {}
    for name, linear in all_prunable(model).items():
        masks[name] = _prune_(linear.weight.detach())
    told = manifest.build(method="magnitude", pattern=PATTERN, masks=masks, data={}, seeds={})
    checkpoints.save(model, tokenizer, out, masks, told, packed=True)


def _large(out: Path) -> None:
    """Random weights of the shapes of a 1.1B model, a shard for each block: one block is in memory at a time."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(CONFIG)
    pruned = [f"{name}.weight" for name in all_prunable(skeleton)]
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    for number, names in enumerate(_shards(list(skeleton.state_dict()))):
        shard = f"model-{number:05}.safetensors"
        tensors = {}
        for name in names:
            shape = skeleton.get_parameter(name).shape
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
                continue
            tensors[name] = (DEVIATION * torch.randn(shape, generator=generator)).bfloat16()
            if name in pruned:
                _prune_(tensors[name])
        save_file(tensors, out / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(names, shard)
    (out / models.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    CONFIG.save_pretrained(out)
    AutoTokenizer.from_pretrained(demo.model_dir()).save_pretrained(out)

    def weight(layer: str) -> Tensor:
        with safe_open(out / places[f"{layer}.weight"], framework="pt") as file:
            return file.get_tensor(f"{layer}.weight")

    def mask(layer: str) -> Tensor:
        found = weight(layer) != 0
        # A kept weight that was drawn as zero would make the rows unequal.
        assert bool((found.sum(1) == found.shape[1] // 2).all())
        return found

    (out / packed.PACKED).parent.mkdir()
    packed.write(out / packed.PACKED, [name.removesuffix(".weight") for name in pruned], weight, mask)


def _shards(names: list[str]) -> Iterator[list[str]]:
    """The names of each block, and of all that is in none."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        number = name.partition(".layers.")[2].partition(".")[0]
        blocks.setdefault(number, []).append(name)
    yield from blocks.values()


def _prune_(weight: Tensor) -> Tensor:
    """Prune by magnitude in place; the mask."""
    mask = pk.select(weight.float().abs(), PATTERN)
    weight.mul_(mask)
    return mask


SUBJECTS = {
    "small": Subject("SmolLM2-135M", _small, speed=1.2, memory=0.70),
    "large": Subject("Llama-1.1B", _large, speed=1.5, memory=0.66),
}
