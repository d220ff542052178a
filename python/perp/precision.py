"""Mixed precision: a model in fp32 computes in bf16 while adapters, norms, their moments and the loss stay fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
    with ExitStack() as undone:
        masters = _narrow(_narrowable(model) if dtype else (), dtype, undone)
        for norm in filter(is_norm, model.modules() if masters else ()):
            undone.enter_context(_in_own_precision(norm, dtype))
        yield masters


@contextmanager
def narrowed_linears(layers: Iterable[SparseLinear], dtype: torch.dtype | None) -> Iterator[Masters]:
    """For the duration, these layers alone compute in `dtype`; yields what `narrowed` does.

    They take and give what they did. A unit is fitted so: the residual stream, whose largest channels would drown a
    16-bit sum's error, and attention stay in full precision, while nearly all of the work is in the products.
    """
    with ExitStack() as undone:
        masters: Masters = {}
        for layer in layers if dtype else ():
            own = layer.values.dtype
            if found := _narrow([layer.values], dtype, undone):
                masters |= found
                undone.enter_context(_hooked(layer, _casting(dtype), _casting(own)))
        yield masters


def _narrow(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None, undone: ExitStack) -> Masters:
    """Narrow those that are wider than `dtype`, until `undone`; what they were, by parameter."""
    wide = [parameter for parameter in parameters if dtype and parameter.dtype.itemsize > dtype.itemsize]
    masters: Masters = {parameter: parameter.data for parameter in wide}
    for parameter in wide:
        undone.callback(setattr, parameter, "data", parameter.data)
        parameter.data = parameter.data.to(dtype)
    return masters


def _narrowable(model: nn.Module) -> list[nn.Parameter]:
    """Every floating-point parameter but those that stay as they are, each once."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        stay = ("lora_A", "lora_B", "bias") if isinstance(module, SparseLinear) else ("lora_A", "lora_B")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and name not in stay and not is_norm(module):
                found[id(parameter)] = parameter
    return list(found.values())


def _in_own_precision(norm: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    own = next(norm.parameters(), torch.empty(0)).dtype
    return _hooked(norm, _casting(own), _casting(dtype))


def _casting(dtype: torch.dtype | None) -> Callable[[Any], Any]:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return cast


@contextmanager
def _hooked(module: nn.Module, before: Callable[[Any], Any], after: Callable[[Any], Any]) -> Iterator[None]:
    """For the duration, `before` is done to each argument of `module` and `after` to its output."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(before, args)), {name: before(value) for name, value in kwargs.items()}

    hooks = (
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(lambda _, args, output: after(output)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
