import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from perp import manifest
from perp.errors import UserError


def example() -> dict[str, Any]:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    return manifest.build(
        method="wanda",
        pattern="0.5/row",
        parts={"norms", "mask_lora"},
        masks={"layers.0.up": mask},
        data={"name": "demo", "sha256": "ab", "count": 3},
        seeds={"calibration": 0, "retrain": 1},
        settings={"retrain": {"lr": 1e-3, "steps": 64}},
        perplexity={"dense": {"wiki": 13.2}, "pruned": {"wiki": float("inf")}},
        seconds={"prune": 1.5},
    )


def test_build_says_what_was_done() -> None:
    content = example()
    assert content["format_version"] == 1
    assert content["sparsity"] == {"layers.0.up": {"pruned": 3, "total": 6}}
    assert content["parts"] == ["mask_lora", "norms"]
    assert content["perplexity"] == {"dense": {"wiki": 13.2}, "pruned": {"wiki": None}}
    assert content["versions"]["torch"] == torch.__version__
    assert content["versions"]["transformers"] == transformers.__version__
    assert set(content["versions"]) == {"perp", "torch", "transformers"}


def test_round_trip(tmp_path: Path) -> None:
    manifest.write(example(), tmp_path / manifest.NAME)
    assert manifest.read(tmp_path) == example()


@pytest.mark.parametrize(
    "path,value,message",
    [
        ("method", 3, "method must be of type str"),
        ("pattern", None, "pattern must be of type str"),
        ("parts", "norms", "parts must be of type list"),
        ("parts", [1], "parts must hold names"),
        ("format_version", "1", "format_version must be of type int"),
        ("format_version", True, "format_version must be of type int"),
        ("format_version", 2, "reads up to 1, so update perp"),
        ("sparsity/layers.0.up", {"pruned": 7, "total": 6}, r"sparsity of layers\.0\.up must count"),
        ("sparsity/layers.0.up", {"pruned": 3.0, "total": 6}, r"sparsity of layers\.0\.up must count"),
        ("sparsity/layers.0.up", 0.5, r"sparsity of layers\.0\.up must count"),
        ("data", [], "data must be of type dict"),
        ("seeds/retrain", "1", "the seed retrain must be an integer"),
        ("versions/torch", 2, "the version of torch must be text"),
        ("perplexity/dense", 13.2, "perplexity of dense must map"),
        ("perplexity/dense", {"wiki": "low"}, "perplexity of dense on wiki must be a number"),
        ("seconds/prune", False, "seconds of prune must be a number"),
    ],
)
def test_wrong_types_are_named(tmp_path: Path, path: str, value: Any, message: str) -> None:
    content = example()
    *outer, last = path.split("/")
    place = content
    for key in outer:
        place = place[key]
    place[last] = value
    (tmp_path / manifest.NAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        manifest.read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", list(example()))
def test_missing_fields_are_named(tmp_path: Path, field: str) -> None:
    content = example()
    del content[field]
    (tmp_path / manifest.NAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{field} is missing"):
        manifest.read(tmp_path)


def test_what_is_no_manifest_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no perp\.json"):
        manifest.read(tmp_path)
    (tmp_path / manifest.NAME).write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="not valid JSON"):
        manifest.read(tmp_path)
    (tmp_path / manifest.NAME).write_text("[1]")
    with pytest.raises(UserError, match="must be a JSON object"):
        manifest.read(tmp_path)
