"""Registration of the ops with torch, under torch.ops.perp_kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from perp_kernels import dispatch

_LIBRARY = torch.library.Library("perp_kernels", "FRAGMENT")

_PLAIN = (Tensor, Parameter)


def serve(name: str, *arguments: Any) -> Any:
    """Run the implementation that serves the op `name` for these arguments."""
    function = dispatch.select(name, *arguments)
    if not torch._C._is_any_autocast_enabled():
        return function(*arguments)
    # An op keeps the dtypes of its contract: autocast would cast the products inside it, and only some of them.
    with torch.autocast(arguments[0].device.type, enabled=False):
        return function(*arguments)


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors has no witness but its kernel: no compiler, trace, mode, transform or profiler,
    no subclass of Tensor, and none that stands for other values than its memory holds. It may then be served without
    torch's dispatcher, which takes as long as a small product.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta or tensor.is_neg()):
            return False
    return (
        not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
    )


def written(*tensors: Tensor) -> None:
    """Tell autograd of what a kernel has written, which torch does not see."""
    for tensor in tensors:
        if not tensor.is_inference():
            increment_version(tensor)


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an op for every device and return its overload.

    `fake` computes the shapes and dtypes of the results alone. The op has no derivative: where one exists, an
    autograd.Function wraps it, which costs half of what torch.library.custom_op with register_autograd does.
    """
    name = schema.partition("(")[0]
    dispatch.register(name, "reference", reference)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, functools.partial(serve, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"perp_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.perp_kernels, name).default
