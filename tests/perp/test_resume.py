import dataclasses
import io
import resource
from pathlib import Path

import pytest
import torch

from perp import resume, retrain
from perp.errors import UserError
from perp.optim import AdamW
from perp.progress import Silent
from perp.retrain import RetrainSettings

from . import families

SETTINGS = RetrainSettings(steps=7, batch=2, lr=1e-2, r=2, alpha=4)


class Interrupt(Silent):
    """Ctrl-C after so many steps of training."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def unit(self, name: str, **figures: float) -> None:
        if name.startswith("step"):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parts": ("full",), "lr": 1e-3},
        {"parts": ("scale_lora", "head")},
        {"precision": "bf16", "parts": ("kept", "norms"), "lr": 1e-3},
    ],
    ids=["mask_lora", "full", "head", "bf16"],
)
def test_an_interrupted_training_goes_on_to_the_same_bits(changes, tmp_path: Path, monkeypatch):
    """Dropout is on: the random generator must go on as well. Interrupted twice, the second time before a write."""
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    settings, file = dataclasses.replace(SETTINGS, **changes), tmp_path / "retrain.pt"
    whole = families.pruned("opt", dropout=0.2)
    losses = retrain.retrain(whole, families.windows(), settings)
    for steps in (3, 0):
        model = families.pruned("opt", dropout=0.2)
        with pytest.raises(KeyboardInterrupt):
            retrain.retrain(model, families.windows(), settings, Interrupt(steps), checkpoint=file)
        assert [path.name for path in tmp_path.iterdir()] == ["retrain.pt"]
    again = families.pruned("opt", dropout=0.2)
    torch.manual_seed(99)
    assert retrain.retrain(again, families.windows(), settings, checkpoint=file) == losses
    for (name, one), (_, other) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    # What had ended is taken from the file, which has no moments by then.
    trained = families.pruned("opt", dropout=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(AdamW, "step", None)
        assert retrain.retrain(trained, families.windows(), settings, checkpoint=file) == losses
    for one, other in zip(whole.parameters(), trained.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.load(file, weights_only=True)["optimiser"]["adam"] is None


def interrupted(file: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        retrain.retrain(families.pruned("opt"), families.windows(), SETTINGS, Interrupt(2), checkpoint=file)


def test_another_training_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    file = tmp_path / "retrain.pt"
    interrupted(file)
    model = families.pruned("opt")
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1
    for subject, ids, settings in (
        (families.pruned("opt"), families.windows(), dataclasses.replace(SETTINGS, lr=1e-3)),
        (families.pruned("opt"), families.windows(seed=1), SETTINGS),
        (model, families.windows(), SETTINGS),
    ):
        with pytest.raises(UserError, match="is of another training; delete it"):
            retrain.retrain(subject, ids, settings, checkpoint=file)


def of_pickle(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None, of_pickle([1])])
def test_a_damaged_file_is_told(content, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    file = tmp_path / "retrain.pt"
    interrupted(file)
    file.write_bytes(file.read_bytes()[:500] if content is None else content)
    with pytest.raises(UserError, match="is damaged; delete it to train from the beginning"):
        retrain.retrain(families.pruned("opt"), families.windows(), SETTINGS, checkpoint=file)


def test_a_full_disk_is_one_sentence_and_leaves_the_file_before(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    file = tmp_path / "retrain.pt"
    interrupted(file)
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(UserError, match=r"retrain\.pt could not be written .* make room"):
            retrain.retrain(families.pruned("opt"), families.windows(), SETTINGS, checkpoint=file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["retrain.pt"]
