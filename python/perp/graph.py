"""What a model keeps for its backward pass, found by running a block and the head without data.

On tensors that have shapes and no numbers (torch's FakeTensorMode, or the meta device where that serves) this takes
no memory and hardly any time, and whatever the block does is counted: norms in fp32, whole attention matrices, capped
logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from perp.blocks import HIDDEN, Stop

# Tokens of the two runs: one tells what grows with them, both what grows with their square.
_SHORT, _LONG = 64, 128
_FEW = 8


def of_block(model: Any, block: nn.Module) -> tuple[float, float] | None:
    """Bytes kept for each token, and for each pair of tokens of a window, of a block of `model` that trains.

    None where it cannot be run without data, as experts cannot, whose tokens go where the numbers say.
    """
    try:
        short, long = (_block_at(model, block, tokens) for tokens in (_SHORT, _LONG))
    except Exception:  # what cannot be run so fails in its own way
        return None
    pairs = (long / _LONG - short / _SHORT) / (_LONG - _SHORT)
    tokens = short / _SHORT - pairs * _SHORT
    # A single number for a pair is a mask, which is left out where there are numbers to see that nothing is padded.
    return tokens, pairs if pairs > model.dtype.itemsize else 0.0


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


def _block_at(model: Any, block: nn.Module, tokens: int) -> int:
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
