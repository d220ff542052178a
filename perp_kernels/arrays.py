"""Arrays of other libraries where a tensor is expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def as_tensor(array: Any) -> Tensor:
    """`array` itself where it is a tensor, else a tensor over its memory, without a copy, through `__dlpack__`.

    NumPy, CuPy and JAX arrays have `__dlpack__`. Anything else is a TypeError.
    """
    if isinstance(array, Tensor):
        return array
    if hasattr(array, "__dlpack__"):
        return torch.from_dlpack(array)
    raise TypeError(f"A tensor or an array with __dlpack__ is needed, not {type(array).__name__}.")


def as_optional_tensor(array: Any) -> Tensor | None:
    return None if array is None else as_tensor(array)
