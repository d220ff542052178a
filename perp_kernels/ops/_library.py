"""Registration of the ops with torch, under torch.ops.perp_kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from perp_kernels import dispatch

_LIBRARY = torch.library.Library("perp_kernels", "FRAGMENT")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an op for every device and return its overload.

    `fake` computes the shapes and dtypes of the results alone. The op has no derivative: where one exists, an
    autograd.Function wraps it, which costs half of what torch.library.custom_op with register_autograd does.
    """
    name = schema.partition("(")[0]
    dispatch.register(name, "reference", reference)

    def serve(*arguments: Any) -> Any:
        function, device = dispatch.select(name, *arguments), arguments[0].device.type
        if not torch.is_autocast_enabled(device):
            return function(*arguments)
        # An op keeps the dtypes of its contract: autocast would cast the products inside it, and only some of them.
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, serve, "CompositeExplicitAutograd")
    torch.library.register_fake(f"perp_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.perp_kernels, name).default
