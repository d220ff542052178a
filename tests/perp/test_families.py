"""Every family goes through the whole of a run, and plain transformers loads what it leaves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from perp import report, run
from perp.blocks import find_blocks, is_norm
from perp.checkpoints import load_masks
from perp.packed_model import load_packed
from perp.settings import RunSettings

from . import tiny
from .families import FAMILIES, MIXTURES, chooses, seeing, windows
from .kill import hurry


@pytest.fixture(scope="module", autouse=True)
def _hurry() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch.setattr)
        yield


def job(model: Path, precision: str = "model") -> RunSettings:
    return RunSettings(
        model=str(model),
        out=model.parent / "out",
        data=str(tiny.text_file(model.parent)),
        pattern="2:4",
        epochs=1,
        steps=2,
        batch=1,
        windows=2,
        seqlen=16,
        eval_windows=2,
        device="cpu",
        packed=True,
        precision=precision,
    )


def state(directory: str | Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def weight_of(state: dict[str, Tensor], name: str, mask: Tensor) -> Tensor:
    """The saved weight of this mask, [N, K] or [E, N, K]: some experts are saved transposed."""
    weight = state[name] if name in state else state[f"{name}.weight"]
    return weight if weight.shape == mask.shape else weight.transpose(1, 2)


@pytest.mark.filterwarnings("ignore:.* linears read no token")
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_the_whole_run(family: str, tmp_path: Path) -> None:
    # Experts train in bf16 in no other test.
    settings = job(tiny.model_dir(tmp_path, family), "bf16" if family in MIXTURES else "model")
    rows = run.run(settings).rows
    assert [row.stage for row in rows] == [report.DENSE, report.PRUNED, report.RECONSTRUCTED, report.RETRAINED]
    assert [row.zeros for row in rows] == [0, 0.5, 0.5, 0.5]
    assert all(math.isfinite(row.perplexity["articles"]) for row in rows)

    plain = AutoModelForCausalLM.from_pretrained(settings.out)
    kind, _ = {**FAMILIES, **MIXTURES}[family]()
    assert type(plain) is kind
    before, after, masks = state(settings.model), plain.state_dict(), load_masks(settings.out)
    assert list(after) == list(before)
    for name, mask in masks.items():
        assert torch.equal(weight_of(after, name, mask) != 0, mask), name
        assert (mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all(), name

    prefix, _ = find_blocks(plain)
    inside = {name for name in before if name.startswith(prefix) and before[name].ndim > 1 and "bias" not in name}
    pruned = {name for name in before if name.removesuffix(".weight") in masks}
    assert pruned == {name for name in inside if not chooses(name)}
    norms = {f"{name}.{own}" for name, m in plain.named_modules() if is_norm(m) for own, _ in m.named_parameters()}
    assert {name for name in before if not torch.equal(after[name], before[name])} == pruned | norms

    packed, _ = load_packed(settings.out)
    with torch.no_grad():
        assert packed(windows(2)).logits.allclose(plain(windows(2)).logits, rtol=1e-3, atol=1e-4)


def test_of_a_model_that_sees_only_the_language_part_changes(tmp_path: Path) -> None:
    words = tiny.tokenizer()
    seeing(len(words)).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    settings = job(tmp_path / "model")
    assert run.run(settings).rows[-1].zeros == 0.5
    before, after, masks = state(settings.model), state(settings.out), load_masks(settings.out)
    assert all(torch.equal(weight_of(after, name, mask) != 0, mask) for name, mask in masks.items())
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert {f"{name}.weight" for name in masks} < changed
    assert all("language_model" in name for name in changed)
    assert any("vision_tower" in name for name in before)
