import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from perp import loss, parts, retrain
from perp.distil import Teacher
from perp.errors import UserError
from perp.loss import WindowLoss
from perp.retrain import RetrainSettings

from . import families

SETTINGS = RetrainSettings(parts=("norms",), steps=3, batch=2, lr=1e-2, distil=0.7, temperature=2.0)


def definition(model, dense, ids, w, t):
    """(1 - w) CE + w t² KL(dense ‖ model), the mean over the targets, in float64."""
    with torch.no_grad():
        p = F.softmax(dense(ids, use_cache=False).logits[:, :-1].double() / t, dim=-1)
    logits = model(ids, use_cache=False).logits[:, :-1].double()
    q = F.log_softmax(logits / t, dim=-1)
    divergence = (p * (p.log() - q)).sum(-1).mean()
    return (1 - w) * F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) + w * t**2 * divergence


@pytest.mark.parametrize("chosen", [{"norms"}, {"full"}], ids=["norms", "full"])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "phi"])
def test_loss_and_gradients_are_the_definition(family, chosen, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS", 5 * families.VOCABULARY)
    dense, model, ids = families.build(family), families.pruned(family), families.windows(4, 9)
    teacher = Teacher(dense, ids, weight=0.7, temperature=2.0)
    parts.select_trainable(model, chosen)
    found = WindowLoss(model, teacher)
    some = [2, 0, 3]
    value = found(ids[some], 1 / 24, some)
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = definition(model, dense, ids[some], 0.7, 2.0)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_head_that_moves_does_not_move_its_teacher():
    dense, ids = families.build("opt"), families.windows(2, 9)
    teacher, model = Teacher(dense, ids, weight=1.0), families.pruned("opt")
    parts.select_trainable(model, {"full"})
    found = WindowLoss(model, teacher)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1 * torch.randn_like(model.lm_head.weight))
    expected = definition(model, dense, ids, 1.0, 1.0)
    assert found(ids, 1 / 16, [0, 1]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_dense_model_is_its_own_perfect_pupil():
    dense, ids = families.build("llama"), families.windows(2, 9)
    teacher = Teacher(dense, ids, weight=1.0)
    parts.select_trainable(dense, {"norms"})
    assert WindowLoss(dense, teacher)(ids, 1.0, [0, 1]).item() == pytest.approx(0, abs=1e-5)


def test_retraining_with_a_teacher_comes_closer_to_the_dense_model():
    dense, ids = families.build("llama"), families.windows(4, 16)
    numbers = torch.cat(retrain.drawn(len(ids), SETTINGS)).tolist()
    teacher = Teacher(dense, ids, numbers, weight=1.0)
    model = families.pruned("llama")
    losses = retrain.retrain(
        model, ids, dataclasses.replace(SETTINGS, parts=("mask_lora", "norms"), steps=12, distil=1.0), teacher=teacher
    )
    assert losses[-1] < 0.8 * losses[0]
    plain = copy.deepcopy(families.pruned("llama"))
    assert retrain.retrain(plain, ids, dataclasses.replace(SETTINGS, distil=0.0)) != losses[:3]


def test_windows_the_teacher_has_not_seen_are_refused():
    ids = families.windows(4)
    teacher = Teacher(families.build("llama"), ids, [0])
    with pytest.raises(UserError, match="has not seen window"):
        retrain.retrain(families.pruned("llama"), ids, SETTINGS, teacher=teacher)
