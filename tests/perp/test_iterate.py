import dataclasses
from fractions import Fraction

import pytest
import torch

from perp.errors import UserError
from perp.iterate import divided, prune_retrain, schedule
from perp.retrain import RetrainSettings
from perp_kernels import Pattern
from tests.perp.families import build, full_loss, windows

SETTINGS = RetrainSettings(parts=("kept", "norms"), steps=7, batch=2, lr=1e-3, seed=5)


@pytest.mark.parametrize(
    "pattern, cycles, kind, expected",
    [
        ("0.5", 1, "geometric", ["0.5"]),
        ("0.75", 2, "geometric", ["0.5", "0.75"]),
        ("0.75/row", 2, "geometric", ["0.5/row", "0.75/row"]),
        ("0.875", 3, "geometric", ["0.5", "0.75", "0.875"]),
        ("0.6", 3, "linear", ["0.2", "0.4", "0.6"]),
        ("0.7", 3, "geometric", ["0.3306", "0.5519", "0.7"]),
        ("2:4", 2, "linear", ["3:4", "2:4"]),
        ("2:4", 2, "geometric", ["3:4", "2:4"]),
        ("4:8", 3, "linear", ["7:8", "5:8", "4:8"]),
        ("1:16", 4, "geometric", ["8:16", "4:16", "2:16", "1:16"]),
    ],
)
def test_schedules(pattern, cycles, kind, expected):
    assert [str(one) for one in schedule(pattern, cycles, kind)] == expected


def test_the_last_pattern_is_the_one_asked_for_to_the_digit():
    *_, last = schedule("0.123456", 3)
    assert last == Pattern.parse("0.123456")
    assert last.sparsity == Fraction(123456, 1000000)


@pytest.mark.parametrize(
    "pattern, cycles, kind, message",
    [
        ("2:4", 3, "linear", "2:4 has too few steps from dense for 3 cycles"),
        ("0.5", 0, "linear", "number of cycles is 0"),
        ("0.5", 2, "cubic", "'cubic' is not a schedule; choose geometric or linear"),
    ],
)
def test_schedules_that_cannot_be(pattern, cycles, kind, message):
    with pytest.raises(UserError, match=message):
        schedule(pattern, cycles, kind)


def test_the_steps_are_divided_and_none_is_lost():
    assert [one.steps for one in divided(SETTINGS, 3)] == [3, 2, 2]
    assert [one.seed for one in divided(SETTINGS, 3)] == [5, 6, 7]
    assert divided(SETTINGS, 1) == [SETTINGS]
    with pytest.raises(UserError, match="7 steps cannot be divided into 8 cycles"):
        divided(SETTINGS, 8)
    with pytest.raises(UserError, match="lora adapters never merge"):
        divided(dataclasses.replace(SETTINGS, parts=("lora",)), 2)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("parts", [("kept", "norms"), ("mask_lora",)], ids="+".join)
def test_masks_are_nested_counts_exact_and_the_model_trained(method, parts):
    model, ids = build("llama"), windows(4, 16)
    patterns = schedule("0.75/row", 2)
    trainings = divided(dataclasses.replace(SETTINGS, parts=parts, steps=12, lr=5e-3), 2)
    first, last = prune_retrain(model, ids, ids, patterns, trainings, method)
    for name, mask in last.masks.items():
        assert not (mask & ~first.masks[name]).any()
        assert (first.masks[name].sum(1) == mask.shape[1] // 2).all()
        assert (mask.sum(1) == mask.shape[1] // 4).all()
        assert not model.get_submodule(name).weight[~mask].any()
    untrained = build("llama")
    for name, mask in last.masks.items():
        untrained.get_submodule(name).weight.data *= mask
    with torch.no_grad():
        assert full_loss(model, ids) < full_loss(untrained, ids)
