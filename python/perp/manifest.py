"""perp.json: what was done to a model, in one file beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from perp.errors import UserError

NAME = "perp.json"
FORMAT_VERSION = 1

_TYPES: dict[str, type] = {
    "format_version": int,
    "method": str,
    "pattern": str,
    "parts": list,
    "sparsity": dict,
    "data": dict,
    "seeds": dict,
    "settings": dict,
    "versions": dict,
    "perplexity": dict,
    "seconds": dict,
}


def build(
    *,
    method: str,
    pattern: str,
    parts: Collection[str] = (),
    masks: Mapping[str, Tensor],
    refined: Mapping[str, Mapping[str, float]] | None = None,
    data: Mapping[str, Any],
    seeds: Mapping[str, int],
    settings: Mapping[str, Any] | None = None,
    perplexity: Mapping[str, Mapping[str, float]] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The content of perp.json, made of JSON types only.

    `parts`: what was trained, empty for a model only pruned. `masks`: qualified layer name -> bool mask, stored as the
    counts of pruned and of all weights. `refined`: layer name -> its error on the windows held out before and after
    its mask was refined, and the steps that took; left out where none was. `data`: identity of the text. `settings`:
    every further choice. `perplexity`: row -> text -> value, stored as null where infinite. `seconds`: stage ->
    wall-clock seconds.
    """
    from perp import __version__

    content = {
        "format_version": FORMAT_VERSION,
        "method": method,
        "pattern": pattern,
        "parts": sorted(parts),
        "sparsity": {name: {"pruned": int((~mask).sum()), "total": mask.numel()} for name, mask in masks.items()},
        "data": dict(data),
        "seeds": dict(seeds),
        "settings": dict(settings or {}),
        "versions": {"perp": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "perplexity": {
            row: {text: value if math.isfinite(value) else None for text, value in values.items()}
            for row, values in (perplexity or {}).items()
        },
        "seconds": dict(seconds or {}),
    }
    if refined:
        content["refined"] = {name: dict(figures) for name, figures in refined.items()}
    return check(json.loads(json.dumps(content, allow_nan=False)), "this manifest")


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write `content` to the file `path`."""
    path.write_text(
        json.dumps(check(dict(content), "this manifest"), indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )


def read(directory: str | Path) -> dict[str, Any]:
    """The manifest of a saved model; UserError where there is none or a value is not of its type."""
    path = Path(directory) / NAME
    if not path.is_file():
        raise UserError(f"{directory} has no {NAME}; give a directory that perp saved.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON; save the model again.") from error
    return check(content, str(path))


def check(content: Any, source: str) -> dict[str, Any]:
    """`content` itself if every value has its type; else UserError naming `source` and the value."""

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise UserError(f"{source} is not a valid manifest: {what}.")

    need(isinstance(content, dict), "it must be a JSON object")
    version = content.get("format_version")
    if _is(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{source} has format version {version}; this perp reads up to {FORMAT_VERSION}, so update perp."
        )
    for field, kind in _TYPES.items():
        need(field in content, f"{field} is missing")
        need(_is(content[field], kind), f"{field} must be of type {kind.__name__}")
    need(all(isinstance(part, str) for part in content["parts"]), "parts must hold names")
    for name, counts in content["sparsity"].items():
        pair: list[Any] = [counts.get("pruned"), counts.get("total")] if isinstance(counts, dict) else []
        valid = len(pair) == 2 and all(_is(count, int) for count in pair) and 0 <= pair[0] <= pair[1]
        need(valid, f"sparsity of {name} must count pruned and total weights")
    for name, seed in content["seeds"].items():
        need(_is(seed, int), f"the seed {name} must be an integer")
    for name, release in content["versions"].items():
        need(isinstance(release, str), f"the version of {name} must be text")
    for row, values in content["perplexity"].items():
        need(isinstance(values, dict), f"perplexity of {row} must map texts to numbers")
        for text, value in values.items():
            need(value is None or _is(value, int, float), f"perplexity of {row} on {text} must be a number or null")
    for stage, value in content["seconds"].items():
        need(_is(value, int, float), f"seconds of {stage} must be a number")
    return content


def _is(value: Any, *kinds: type) -> bool:
    """isinstance, but true and false are not numbers."""
    return isinstance(value, kinds) and not isinstance(value, bool)
