"""Several processes on one job, started by torchrun: which one this is, and all that they tell each other.

A process is a rank. Outside of `joined` there is one, and every function here is that of a single rank: nothing is
sent. What is called on one rank is called on all of them, in the same order.

| what | spread how |
|---|---|
| calibration windows | rank r has windows r, r + size, ...; what is summed over tokens is added up |
| the matrices of a unit | each is pruned, refined and refitted by one rank, which sends the others the result |
| a batch of reconstruction | each rank computes on those of its windows that are its own; gradients are added up |
| a batch of retraining | each rank computes on an equal part; gradients are added up |
| judging | each rank has a part of the windows; their losses are added in the order of one rank |
| text, pass order, adapters' start | the same on every rank, from the same seeds |
| output, progress, warnings | the first rank's |
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from perp import machine
from perp.errors import Echo, UserError

T = TypeVar("T")
K = TypeVar("K")
S = TypeVar("S", Tensor, Sequence[int])

# How long a rank waits for another: longer than a slow disk takes to read a model. One that dies is noticed earlier,
# by its connections and by torchrun.
PATIENCE = timedelta(minutes=30)

# Tensors of fewer elements are added up together: one message of 4 MB takes hardly longer than an empty one.
_SMALL = 1 << 20

_rank, _size = 0, 1


def rank() -> int:
    return _rank


def size() -> int:
    """How many ranks there are."""
    return _size


def leads() -> bool:
    """Whether this is the rank that writes and tells."""
    return _rank == 0


def neighbours() -> int:
    """How many ranks share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _size > 1 else 1


@contextmanager
def joined(device: str | None = None) -> Iterator[str]:
    """Join the processes that torchrun has started, for the duration; yields the device of this one.

    `device`: "cpu", "cuda" or None, for the GPU of the rank's own number on its machine where there are GPUs. Other
    ranks than the first give no warnings and log nothing. A process group that is there already is used, and has to
    serve CPU tensors, too. UserError, on all ranks, where one has no device. Alone, it
    yields the device that was asked for or found.
    """
    if machine.processes() == 1:
        yield machine.find_device(device)
        return
    with ExitStack() as undone:
        if not dist.is_initialized():
            # Objects and CPU tensors go by gloo; NCCL is for tensors on GPUs.
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
            undone.callback(dist.destroy_process_group)
        undone.callback(_enter, _rank, _size)
        _enter(dist.get_rank(), dist.get_world_size())
        if not leads():
            undone.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            logger = logging.getLogger("perp")
            undone.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        with together():
            device = _own_device(device)
        yield device


@contextmanager
def alone() -> Iterator[None]:
    """For the duration, this rank is on its own: what is computed is of no other's concern, and nothing is sent."""
    before = _rank, _size
    _enter(0, 1)
    try:
        yield
    finally:
        _enter(*before)


def _enter(rank: int, size: int) -> None:
    global _rank, _size
    _rank, _size = rank, size


def _own_device(asked: str | None) -> str:
    kind = machine.find_device(asked)
    if kind == "cpu":
        return kind
    if kind != "cuda":
        raise UserError(f"each of {_size} ranks has a device of its own, and {kind} is one for all; give cuda or cpu.")
    device = machine.find_device(f"cuda:{os.environ.get('LOCAL_RANK', _rank)}")
    torch.cuda.set_device(device)
    return device


@contextmanager
def together() -> Iterator[None]:
    """Every rank ends the block before one goes on; an error on any is raised on all.

    Where it happened it is raised as it is (on the first such rank, if several have one), elsewhere as an `Echo` of it.
    The block must not send anything itself.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    told = gather(None if own is None else (type(own).__name__, str(own)))
    failed = [(at, error) for at, error in enumerate(told) if error]
    if not failed:
        return
    at, (kind, sentence) = failed[0]
    if own is not None and at == _rank:
        raise own
    raise Echo(sentence if kind == UserError.__name__ else f"rank {at} failed: {kind}: {sentence}") from own


def gather(value: T) -> list[T]:
    """What each rank gives, by rank; any object that can be pickled."""
    if _size == 1:
        return [value]
    found: list[Any] = [None] * _size
    dist.all_gather_object(found, value)
    return found


def merged(own: Mapping[K, T]) -> dict[K, T]:
    """The items of all ranks."""
    return {key: value for part in gather(dict(own)) for key, value in part.items()}


def agreed(own: Mapping[K, T]) -> dict[K, T]:
    """The items that are the same on all ranks."""
    parts = gather(dict(own))
    return {key: value for key, value in own.items() if all(key in part and part[key] == value for part in parts)}


def total(own: float) -> float:
    """The sum over the ranks, in order and in double precision: the same on each."""
    return math.fsum(gather(own))


def share(own: float) -> float:
    """`own` over the sum of all ranks'; 1 where that is nothing."""
    whole = total(own)
    return own / whole if whole else 1.0


@torch.no_grad()
def add_up_(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its sum over the ranks, to the same bits on each."""
    if _size == 1:
        return
    small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() < _SMALL:
            small.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        else:
            _all_reduce_(tensor)
    for alike in small.values():
        joint = torch.cat([tensor.flatten() for tensor in alike])
        _all_reduce_(joint)
        for tensor, summed in zip(alike, joint.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def _all_reduce_(tensor: Tensor) -> None:
    whole = tensor.contiguous()
    dist.all_reduce(whole)
    if whole is not tensor:
        tensor.copy_(whole)


@torch.no_grad()
def send_out_(tensor: Tensor, source: int, through: torch.device | None = None) -> None:
    """`tensor` becomes that of the rank `source`, sent between devices of the kind `through` (its own)."""
    if _size == 1:
        return
    whole = tensor.to(through or tensor.device).contiguous()
    # As bytes: not every backend sends every dtype.
    dist.broadcast(whole.view(torch.uint8), source)
    if whole is not tensor:
        tensor.copy_(whole)


def number(index: int) -> int:
    """The number among all windows of this rank's window `index`."""
    return index * _size + _rank


def held(numbers: Iterable[int]) -> list[int]:
    """Those of these windows that this rank has, by their index here."""
    return [one // _size for one in numbers if one % _size == _rank]


def part(items: S) -> S:
    """This rank's part: every size-th item."""
    return items[_rank::_size]


def most(count: int) -> int:
    """How many of so many items the first rank gets, which gets the most."""
    return -(-count // _size)


def check_windows(count: int) -> None:
    """UserError where only some ranks would have any of so many calibration windows."""
    if 0 < count < _size:
        raise UserError(
            f"{count} calibration windows are too few for {_size} ranks; give --windows {_size} or more, or start "
            "fewer ranks."
        )


def check_batch(count: int) -> None:
    """UserError where a rank would have none of a batch of so many windows."""
    if count < _size:
        raise UserError(
            f"a batch of {count} windows is too small for {_size} ranks; give --batch {_size} or more, or start fewer "
            "ranks."
        )


def spread(costs: Mapping[K, float]) -> dict[K, int]:
    """A rank for each item, the loads about equal: the dearest first, each to the rank that has the least."""
    loads, owners = [0.0] * _size, dict.fromkeys(costs, 0)
    for item in sorted(costs, key=lambda item: -costs[item]):
        owners[item] = loads.index(min(loads))
        loads[owners[item]] += costs[item]
    return owners
