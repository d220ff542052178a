"""Adapters that are kept beside a model instead of merged: OUT/perp/adapter/, in the form that PEFT reads and writes.

adapter_config.json         peft_type LORA, r, lora_alpha, target_modules
adapter_model.safetensors   base_model.model.LAYER.lora_A.weight [r, in], ....lora_B.weight [out, r]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from perp.adapters import Adapter
from perp.errors import UserError
from perp.linear import replace_module
from perp.lora_linear import LoraLinear

ADAPTER = Path("perp", "adapter")
_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def write(adapters: Mapping[str, Adapter], directory: Path) -> None:
    """Write the adapters of these layers into `directory`, which is made; all are of one rank and scale."""
    directory.mkdir(parents=True)
    first = next(iter(adapters.values()))
    r = first.A.shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": first.scale * r,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(adapters),
    }
    (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    factors = {}
    for name, adapter in adapters.items():
        factors[f"{_PREFIX}{name}.lora_A.weight"] = adapter.A.cpu().contiguous()
        factors[f"{_PREFIX}{name}.lora_B.weight"] = adapter.B.cpu().contiguous()
    save_file(factors, directory / _WEIGHTS, metadata={"format": "pt"})


def load(model: nn.Module, directory: str | Path) -> list[str]:
    """Put the adapters kept in `directory` (what `perp run --keep-adapters` left) beside the linears of `model`, loaded
    from there; returns the names of the layers. Each computes y = x (W + scale · B A)^T + bias from then on.
    """
    path = Path(directory) / ADAPTER
    try:
        config: dict[str, Any] = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        factors = load_file(path / _WEIGHTS)
        scale = config["lora_alpha"] / config["r"]
        names = [key.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for key in factors if "lora_A" in key]
        pairs = {n: tuple(factors[f"{_PREFIX}{n}.lora_{half}.weight"] for half in "AB") for n in names}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} holds no readable adapters; give a directory left by --keep-adapters.") from error
    modules = dict(model.named_modules())
    for name, (A, B) in pairs.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != (len(B), A.shape[1]):
            raise UserError(f"{path} adapts {name}, which is no such layer of this model; load it from {directory}.")
    for name, (A, B) in pairs.items():
        replace_module(model, name, LoraLinear(modules[name], A, B, scale))
    return names
