import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from perp import adapters, head, parts, retrain
from perp.errors import UserError
from perp.linear import unswap
from perp.retrain import RetrainSettings

from . import families

SETTINGS = RetrainSettings(parts=("head",), steps=4, batch=2, lr=1e-2, r=3, alpha=6)


def trained(family: str, **changes: object):
    model = families.pruned(family, **changes)
    retrain.retrain(model, families.windows(), SETTINGS)
    return model


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_merge_is_the_sum_and_the_logits_stay(family: str) -> None:
    model = trained(family, tie_word_embeddings=False)
    layer = model.lm_head
    expected = layer.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()
    before = model(families.windows()).logits
    assert adapters.merge(model) == ["lm_head"]
    assert type(model.lm_head) is nn.Linear
    torch.testing.assert_close(model.lm_head.weight.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model(families.windows()).logits, before, rtol=1e-4, atol=1e-5)


def test_a_tied_embedding_never_moves_and_the_untied_head_survives_saving(tmp_path: Path) -> None:
    model = families.pruned("opt")
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    start = embedding.detach().clone()
    retrain.retrain(model, families.windows(), SETTINGS)
    before = model(families.windows()).logits
    adapters.merge(model)
    unswap(model)
    assert model.get_input_embeddings().weight is embedding
    assert torch.equal(embedding, start)
    assert model.lm_head.weight is not embedding
    assert not torch.equal(model.lm_head.weight, start)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.get_input_embeddings().weight, start)
    torch.testing.assert_close(again(families.windows()).logits, before, rtol=1e-4, atol=1e-5)


def test_the_adapter_is_counted_and_starts_at_nothing() -> None:
    model = families.pruned("opt")
    total = parts.count_trainable(model)[1]
    before = model(families.windows()).logits
    assert head.attach(model, r=3, alpha=6, seed=0) == "lm_head"
    torch.testing.assert_close(model(families.windows()).logits, before, rtol=0, atol=0)
    parts.select_trainable(model, {"head"})
    assert parts.count_trainable(model) == (3 * (families.VOCABULARY + families.HIDDEN), total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_heads_train_in_fp32(dtype: torch.dtype) -> None:
    model = families.pruned("llama", dtype, tie_word_embeddings=False)
    losses = retrain.retrain(model, families.windows(2), dataclasses.replace(SETTINGS, steps=8, lr=3e-2))
    assert losses[-1] < losses[0]
    assert model.lm_head.lora_A.dtype == torch.float32
    adapters.merge(model)
    assert model.lm_head.weight.dtype == dtype


def test_a_model_without_a_linear_head_is_refused() -> None:
    model = families.pruned("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match=r"has no nn\.Linear as its head"):
        retrain.retrain(model, families.windows(), SETTINGS)
