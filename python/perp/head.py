"""The head: it is not pruned, so a classical LoRA adapter trains it and is added to it, without moving an embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from perp.errors import UserError
from perp.linear import replace_module
from perp.lora_linear import LoraLinear
from perp.modes import MODES

# Rows of a head that are widened at once: a vocabulary of 150,000 would take gigabytes in fp32.
_ROWS = 4096


class AdaptedHead(LoraLinear):
    """The head of a model with its adapter."""

    @torch.no_grad()
    def merged(self, in_place: bool) -> nn.Linear:
        """The layer as nn.Linear: W + scale · B A, in fp32 per element, in W's memory or beside it."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.register_parameter("bias", self.bias)
        weight = self.weight if in_place else nn.Parameter(self.weight.detach().clone(), self.weight.requires_grad)
        for rows, b in zip(weight.split(_ROWS), self.lora_B.split(_ROWS), strict=True):
            rows.copy_(torch.addmm(rows.to(b.dtype), b, self.lora_A, alpha=self.scale))
        linear.weight = weight
        return linear.train(self.training)


def attach(model: Any, r: int, alpha: float, seed: int) -> str:
    """Give the head of `model` a LoRA adapter that changes nothing yet; the head's name."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None or not isinstance(head, nn.Linear) or isinstance(head, AdaptedHead):
        raise UserError(f"{type(model).__name__} has no nn.Linear as its head to adapt; leave the part head out.")
    generator = torch.Generator().manual_seed(seed)
    A, B = MODES["lora"].start(tuple(head.weight.shape), r, generator)
    replace_module(model, name, AdaptedHead(head, A, B, alpha / r))
    return name


def adapted(model: nn.Module) -> dict[str, AdaptedHead]:
    """The adapted heads of `model` by name: one, or none."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedHead)}


def merge(model: nn.Module) -> list[str]:
    """Add the head's adapter to its weight, as an nn.Linear again; its name, in a list.

    A head tied to the input embedding is untied: it gets a matrix of its own, the embedding stays as it was, and the
    configuration says so, so that the saved model loads as it was trained.
    """
    heads = adapted(model)
    for name, head in heads.items():
        tied = _is_tied(model, head)
        replace_module(model, name, head.merged(in_place=not tied))
        if tied:
            _untie(model)
    return list(heads)


def replace_weight(model: Any, weight: torch.Tensor) -> None:
    """Give the head of `model` this weight of its own, untied from an embedding that it shares."""
    head = model.get_output_embeddings()
    tied = _is_tied(model, head)
    head.weight = nn.Parameter(weight, requires_grad=head.weight.requires_grad)
    if tied:
        _untie(model)


def _is_tied(model: nn.Module, head: Any) -> bool:
    others = [module for module in model.modules() if module is not head]
    return any(own is head.weight for module in others for own in module.parameters(recurse=False))


def _untie(model: Any) -> None:
    config = getattr(model, "config", None)
    if config is None:
        return
    for settings in {id(c): c for c in (config, config.get_text_config())}.values():
        settings.tie_word_embeddings = False
    # What the library derived from the configuration when it made the model.
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
