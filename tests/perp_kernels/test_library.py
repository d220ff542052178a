"""A call without the dispatcher is one that nobody could have watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import perp_kernels as pk
from perp_kernels import dispatch
from perp_kernels.ops._library import unwatched

from .oracles import normal, random_weight

NAME = "perp_kernels::sparse_linear"


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Marked(Tensor):
    """A subclass, whose operators __torch_function__ may replace."""


def by_mode(call: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    with Names() as mode:
        call(x)
    return NAME in mode.seen


def by_profiler(call: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    with torch.autograd.profiler.profile() as profile:
        call(x)
    return any(event.name == NAME for event in profile.function_events)


def by_trace(call: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    return NAME in str(torch.jit.trace(call, x, check_trace=False).graph)


def by_make_fx(call: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    from torch.fx.experimental.proxy_tensor import make_fx

    return "sparse_linear" in make_fx(call)(x).code


def by_fake_tensors(call: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    from torch._subclasses import FakeTensor, FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return isinstance(call(mode.from_tensor(x)), FakeTensor)


def by_function_mode(call: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    with Functions() as mode:
        call(x)
    return any("sparse_linear" in name for name in mode.seen)


@pytest.mark.parametrize("watcher", [by_mode, by_function_mode, by_profiler, by_trace, by_make_fx, by_fake_tensors])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit")
def test_watchers_see_the_op(watcher: Callable[..., bool]) -> None:
    _, _, w = random_weight((6, 12), "bitmap")
    assert watcher(lambda x: pk.sparse_linear(x, w), normal(3, 12))


def test_who_watches() -> None:
    x = normal(2, 12)
    assert unwatched(x, torch.nn.Parameter(x))
    with torch.inference_mode():
        assert unwatched(x)
    assert not unwatched(x, x.as_subclass(Marked))
    with Names():
        assert not unwatched(x)
    seen = []
    torch.vmap(lambda row: (seen.append(unwatched(row)), row)[1])(x)
    assert seen == [False]


@pytest.mark.parametrize("layout", ["dense", "bitmap", "semi24"])
def test_both_ways_give_the_same(layout: str) -> None:
    _, _, w = random_weight((6, 12), layout)
    x, bias = normal(3, 12), normal(6)
    with dispatch.served() as direct:
        y = pk.sparse_linear(x, w, bias)
    with Names(), dispatch.served() as dispatched:
        assert torch.equal(pk.sparse_linear(x, w, bias), y)
    assert direct == dispatched
    assert not y.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pk.sparse_linear(x, w, bias).dtype == x.dtype


def test_tensors_that_stand_for_other_values_than_their_memory() -> None:
    _, _, w = random_weight((6, 12), "bitmap")
    x, bias = normal(3, 12), normal(6)
    assert w.row_ptr is not None  # whose values the reference would ask for
    assert pk.sparse_linear(x.to("meta"), w.to("meta")).shape == (3, 6)
    expected = pk.sparse_linear(-x, w, -bias)
    assert torch.equal(pk.sparse_linear(torch._neg_view(x), w, torch._neg_view(bias)), expected)
