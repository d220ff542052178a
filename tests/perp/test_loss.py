from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perp import adapters, loss, parts
from perp.linear import SparseLinear
from perp.loss import WindowLoss

from . import families
from .families import full_loss, pruned


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_loss_and_gradients_are_those_of_the_whole_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS", 5 * families.VOCABULARY)
    model = pruned(family)
    adapters.attach(model, r=2)
    for module in model.modules():
        if isinstance(module, SparseLinear):
            nn.init.normal_(module.lora_B, std=0.1)
    parts.select_trainable(model, {"mask_lora", "norms", "biases"})
    ids = families.windows(3, 9)
    window_loss = WindowLoss(model)
    assert window_loss.head.apart
    found = window_loss(ids, 1 / 24)
    found.backward()
    chunked = gradients(model)
    whole = full_loss(model, ids)
    whole.backward()
    expected = gradients(model)
    torch.testing.assert_close(found, whole)
    assert chunked.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS", 4 * families.VOCABULARY)
    model = pruned()
    parts.select_trainable(model, {"norms"})
    window_loss = WindowLoss(model)
    positions: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: positions.append(output[..., 0].numel()))
    window_loss(families.windows(2, 10), 1.0).backward()
    assert positions == [4, 4, 4, 4, 2]


class Unlike(nn.Module):
    """A head that needs more than the decoder's hidden state: running it apart would give other logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, **rest: Any) -> Any:
        output = self.model(input_ids=input_ids, **rest)
        output.logits = output.logits + F.one_hot(input_ids, families.VOCABULARY)
        return output

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "model" else getattr(self.model, name)


def test_a_head_that_cannot_be_run_apart_is_left_whole() -> None:
    model = Unlike(pruned())
    parts.select_trainable(model, {"norms"})
    window_loss = WindowLoss(model)
    assert not window_loss.head.apart
    ids = families.windows(2, 8)
    torch.testing.assert_close(window_loss(ids, 1 / 14), full_loss(model, ids))
    window_loss(ids, 1.0).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
