"""perp: prune a language model, win its quality back on one GPU, keep every zero.

The names below are imported when they are first used, so that `import perp` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> where it is. A function called like its module gets a second name, so that neither hides the other.
_PUBLIC = {
    "load": "perp.models:load",
    "documents": "perp.data:documents",
    "split": "perp.data:split",
    "windows": "perp.data:windows",
    "training_windows": "perp.data:training_windows",
    "sample": "perp.data:sample",
    "perplexity": "perp.evaluate:perplexity",
    "prune_model": "perp.prune:prune_model",
    "ReconstructSettings": "perp.reconstruct:ReconstructSettings",
    "SparseLinear": "perp.linear:SparseLinear",
    "swap_linears": "perp.linear:swap_linears",
    "unswap": "perp.linear:unswap",
    "attach": "perp.adapters:attach",
    "select_trainable": "perp.parts:select_trainable",
    "count_trainable": "perp.parts:count_trainable",
    "merge": "perp.adapters:merge",
    "detach": "perp.adapters:detach",
    "load_adapters": "perp.adapter_files:load",
    "RetrainSettings": "perp.retrain:RetrainSettings",
    "retrain_model": "perp.retrain:retrain",
    "Teacher": "perp.distil:Teacher",
    "save": "perp.checkpoints:save",
    "load_masks": "perp.checkpoints:load_masks",
    "load_packed": "perp.packed_model:load_packed",
    "pack": "perp.packed_model:pack",
    "RunSettings": "perp.settings:RunSettings",
    "run_job": "perp.run:run",
    "UserError": "perp.errors:UserError",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name].split(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
