"""Mixed precision: a model in fp32 computes in bf16 while adapters, norms, their moments and the loss stay fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from perp.blocks import is_norm
from perp.errors import UserError
from perp.linear import SparseLinear

# By the name a user gives: None is the model's own.
PRECISIONS: dict[str, torch.dtype | None] = {"model": None, "bf16": torch.bfloat16}

Masters = dict[nn.Parameter, Tensor]


def get(name: str) -> torch.dtype | None:
    """The dtype of that name; UserError for an unknown one."""
    if name not in PRECISIONS:
        raise UserError(f"{name!r} is not a precision; choose one of {', '.join(PRECISIONS)}.")
    return PRECISIONS[name]


@contextmanager
def narrowed(model: Any, dtype: torch.dtype | None) -> Iterator[Masters]:
    """For the duration, `model` computes in `dtype`; yields what its narrowed parameters were, which they become again.

    What is yielded is the full-precision weight itself: whoever trains a narrowed parameter updates that, and finds it
    in the model at the end. Norms keep their precision and hand on `dtype`; so do adapters and the biases of a
    SparseLinear, which its ops take in fp32. Narrow copies cost half of the model's memory once more.
    """
    wide = [] if dtype is None else [p for p in _narrowable(model) if p.dtype.itemsize > dtype.itemsize]
    masters: Masters = {parameter: parameter.data for parameter in wide}
    with ExitStack() as undone:
        for parameter in wide:
            undone.callback(setattr, parameter, "data", parameter.data)
            parameter.data = parameter.data.to(dtype)
        for norm in filter(is_norm, model.modules() if wide else ()):
            undone.enter_context(_in_own_precision(norm, dtype))
        yield masters


def _narrowable(model: nn.Module) -> list[nn.Parameter]:
    """Every floating-point parameter but those that stay as they are, each once."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        stay = ("lora_A", "lora_B", "bias") if isinstance(module, SparseLinear) else ("lora_A", "lora_B")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and name not in stay and not is_norm(module):
                found[id(parameter)] = parameter
    return list(found.values())


@contextmanager
def _in_own_precision(norm: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    own = next(norm.parameters(), torch.empty(0)).dtype

    def wide(value: Any) -> Any:
        return value.to(own) if isinstance(value, Tensor) and value.is_floating_point() else value

    def widen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(wide, args)), {name: wide(value) for name, value in kwargs.items()}

    hooks = (
        norm.register_forward_pre_hook(widen, with_kwargs=True),
        norm.register_forward_hook(lambda _, args, output: output.to(dtype)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
