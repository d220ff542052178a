from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from perp import evaluate, loss
from perp.errors import UserError
from perp.evaluate import perplexity

from . import tiny
from .families import FAMILIES, build, windows


def oracle(model, tokens) -> float:
    """The definition, window by window, in float64."""
    model = model.double()
    losses = []
    for window in tokens:
        logits = model(input_ids=window[None]).logits[0]
        losses.append(F.cross_entropy(logits[:-1], window[1:]).item())
    model.float()
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_perplexity_is_its_definition_whatever_the_head(family, monkeypatch):
    # Three positions at a time: uneven chunks over eleven targets.
    monkeypatch.setattr(loss, "LOGITS", 3 * 96)
    model, tokens = build(family), windows(3, 12)
    found = perplexity(model, tokens)
    assert found == pytest.approx(oracle(model, tokens), rel=1e-5)
    assert perplexity(model, tokens) == found


def test_the_model_is_left_as_it_was():
    model, tokens = build("llama").train(), windows(1, 12)
    before = model(input_ids=tokens).logits
    perplexity(model, tokens)
    assert model.training
    assert torch.equal(model(input_ids=tokens).logits, before)
    assert "forward" not in vars(model.get_decoder())


def test_logits_of_a_window_are_never_whole(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS", 2 * 96)
    model = build("llama")
    rows = []
    model.lm_head.register_forward_hook(lambda module, arguments, output: rows.append(output.shape[-2]))
    perplexity(model, windows(1, 12))
    # Twice the probe, which asks for all of its few tokens; then the window.
    assert rows == [loss.PROBE, loss.PROBE, 2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(value):
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 0] = value
    with pytest.raises(UserError, match="output on window 1 of 2 is NaN or infinite"):
        perplexity(model, windows(2, 12))
    assert "forward" not in vars(model.get_decoder())


def test_a_window_needs_a_target():
    with pytest.raises(UserError, match="at least two tokens"):
        perplexity(build("llama"), windows(3, 1))


def test_texts_are_told_apart_by_their_full_name_where_labels_are_alike(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    one, two = tiny.text_file(tmp_path / "a"), tiny.text_file(tmp_path / "b", count=40)
    texts = evaluate.read_texts([str(one), str(two)], "test")
    assert list(texts) == ["articles (test)", f"{two} (test)"]
    assert texts["articles (test)"] == tiny.articles(60)[::20]
    assert list(evaluate.read_texts([str(one)], "all")["articles"]) == tiny.articles(60)
    with pytest.raises(UserError, match="choose among test, validation, train, all"):
        evaluate.read_texts([str(one)], "some")


def test_windows_are_no_longer_than_the_model_knows():
    model = build("llama")
    assert evaluate.window_length(model, None) == 64
    assert evaluate.window_length(model, 7) == 7
    with pytest.raises(UserError, match="at most 64 tokens"):
        evaluate.window_length(model, 65)
