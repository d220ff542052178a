"""What a model keeps for its backward pass and forms in it, found by running a block and the head without data.

On tensors that have shapes and no numbers (torch's FakeTensorMode, or the meta device where that serves) this takes
no memory and hardly any time, and whatever the block does is counted: norms in fp32, whole attention matrices, capped
logits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_outputs import MoeModelOutputWithPast

from perp.blocks import HIDDEN, Stop, hidden_of, replaced_forwards
from perp.experts import ExpertLinear, opened

# Tokens of the two runs: one tells what grows with them, both what grows with their square.
_SHORT, _LONG = 64, 128
_FEW = 8


@dataclass(frozen=True)
class Growth:
    """Bytes for each token, and for each pair of tokens of a window."""

    token: float
    pair: float = 0.0

    def at(self, tokens: int, seqlen: int) -> float:
        return tokens * (self.token + self.pair * seqlen)

    def times(self, factor: float) -> Growth:
        return Growth(factor * self.token, factor * self.pair)


@dataclass(frozen=True)
class Graph:
    """Of a block: what it keeps for its backward pass, and what that has in hand beside."""

    kept: Growth
    formed: Growth


def of_block(model: Any, block: nn.Module) -> Graph | None:
    """Of a block of `model` that trains; None where it cannot be run without data, as where numbers decide its shapes.

    Experts are open, as in every job: closed ones call the library's product, which without data is of bf16 alone.
    """
    with opened(model), _through_one_expert(model):
        try:
            kept = _growth(model, *(_kept_at(model, block, tokens) for tokens in (_SHORT, _LONG)))
            formed = _growth(model, *(_formed_at(model, block, tokens) for tokens in (_SHORT, _LONG)))
        except Exception:  # what cannot be run so fails in its own way
            return None
    return Graph(kept, formed)


@contextmanager
def _through_one_expert(model: nn.Module) -> Iterator[None]:
    """For the duration, all tokens go through the first of open experts: which has which only numbers tell, and what
    is kept and formed is as large."""
    experts = [module for module in model.modules() if isinstance(module, ExpertLinear)]

    def replace(index: int, _: Callable[..., Any]) -> Callable[..., Any]:
        weight, bias = experts[index].weight, experts[index].bias
        return lambda x, offsets: F.linear(x, weight[0], None if bias is None else bias[0])

    with replaced_forwards(experts, replace):
        yield


def _growth(model: Any, short: int, long: int) -> Growth:
    pairs = (long / _LONG - short / _SHORT) / (_LONG - _SHORT)
    tokens = short / _SHORT - pairs * _SHORT
    # A single number for a pair is a mask, which is left out where there are numbers to see that nothing is padded.
    return Growth(tokens, pairs) if pairs > model.dtype.itemsize else Growth(tokens)


def of_head(model: Any) -> int:
    """How many tensors as large as the logits the head keeps; 0 where it cannot be run without data."""
    config, decoder = model.config.get_text_config(), model.get_decoder()
    hidden = torch.zeros(1, _FEW, config.hidden_size, dtype=model.dtype, device=model.device, requires_grad=True)
    # The answer with the most names, whichever of them this model reads.
    decoder.forward = lambda *arguments, **named: MoeModelOutputWithPast(last_hidden_state=hidden)
    try:
        with _kept() as kept:
            model(input_ids=torch.zeros(1, _FEW, dtype=torch.int64, device=model.device), use_cache=False)
    except Exception:  # a head that wants more than hidden states counts as a plain product
        return 0
    finally:
        del decoder.forward
    return sum(size == _FEW * config.vocab_size * model.dtype.itemsize for size in kept.values())


def _kept_at(model: Any, block: nn.Module, tokens: int) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
    with _kept() as kept, suppress(Stop), torch.enable_grad():
        given: set[int] = set()

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.clear()
            named = [value for name, value in kwargs.items() if name != HIDDEN]
            rest = [*(args if HIDDEN in kwargs else args[1:]), *named]
            given.update(_place(one) for one in rest if isinstance(one, Tensor))

        def end(*_: Any) -> None:
            raise Stop

        hooks = (block.register_forward_pre_hook(begin, with_kwargs=True), block.register_forward_hook(end))
        try:
            model.get_decoder()(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    own = {_place(parameter) for parameter in model.parameters()}
    return sum(size for place, size in kept.items() if place not in own | given)


def _formed_at(model: Any, block: nn.Module, tokens: int) -> int:
    """Bytes in hand in the block's backward pass beyond what is kept; weights' gradients are no part of it."""
    live, own = _Live(), block.forward
    flags = [parameter.requires_grad for parameter in block.parameters()]

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = (kwargs[HIDDEN] if HIDDEN in kwargs else args[0]).detach().requires_grad_()
        if HIDDEN in kwargs:
            kwargs = {**kwargs, HIDDEN: hidden}
        else:
            args = (hidden, *args[1:])
        with torch.enable_grad(), live:
            output = hidden_of(own(*args, **kwargs), hidden.shape)
            live.kept = live.most = live.now
            torch.autograd.grad(output, [hidden], torch.ones_like(output))
        raise Stop

    block.requires_grad_(False)
    block.forward = forward
    try:
        with suppress(Stop):
            ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
            model.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        del block.forward
        for parameter, flag in zip(block.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    return live.most - live.kept


class _Live(TorchDispatchMode):
    """Bytes of the tensors that were made meanwhile and are alive, now and at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.kept = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_place(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        output = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and _place(tensor) not in given | self._sizes.keys():
                storage = tensor.untyped_storage()
                self._sizes[_place(tensor)] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, _place(tensor))
        return output

    def _freed(self, place: int) -> None:
        self.now -= self._sizes.pop(place, 0)


@contextmanager
def _kept() -> Iterator[dict[int, int]]:
    """Bytes of what autograd keeps meanwhile, each memory once."""
    found: dict[int, int] = {}
    # Else the memory of one that is gone could be taken for another's.
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found[_place(tensor)] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, unpack):
        yield found


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
