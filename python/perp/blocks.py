"""The decoder's blocks: where they are, what they are called with, and how to run one alone."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from perp.activations import InMemory
from perp.errors import UserError
from perp.experts import linears

# What a block is called with beside its hidden state: positional and keyword arguments. A hidden state that the model
# passes by keyword leaves its key in the keywords, with None as its value.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# Those for a batch of windows, given by their numbers.
ArgumentsOf = Callable[[Sequence[int]], Arguments]

# Has the weights of one block, given by its number, in memory for the duration.
Enter = Callable[[int], AbstractContextManager[None]]

HIDDEN = "hidden_states"

# The hidden state of a call and the rest of it.
_Call = tuple[Tensor, Arguments]
# A block's output: None for a bare hidden state, else the items of the tuple and the hidden state's place among them.
_Output = tuple[tuple[Any, ...], int] | None

# Tokens of the one real forward: enough for attention to mix some, cheap beside a window.
SHORT = 8


class Stop(Exception):
    """Ends a forward that has run as far as it is needed."""


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks and their qualified name: under `get_decoder()`, the ModuleList with the most parameters."""
    lists = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    # max returns the first of equals, and modules() lists the outer before the inner.
    blocks = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=None)
    if blocks is None:
        raise UserError(f"{type(model).__name__} holds no list of decoder blocks; use a decoder-only language model.")
    return next(name for name, module in model.named_modules() if module is blocks), blocks


def prunable(block: nn.Module, prefix: str) -> dict[str, Any]:
    """The weights to prune, `perp.experts.linears` of the block, by name qualified with `prefix`, in module order."""
    return {f"{prefix}.{name}": linear for name, linear in linears(block).items()}


def all_prunable(model: PreTrainedModel) -> dict[str, Any]:
    """`prunable` of all blocks of the model, in order; UserError where there is nothing."""
    prefix, blocks = find_blocks(model)
    found: dict[str, Any] = {}
    for index, block in enumerate(blocks):
        found |= prunable(block, f"{prefix}.{index}")
    if not found:
        raise UserError(f"the blocks of {type(model).__name__} hold no nn.Linear to prune.")
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether this is a normalisation, whatever its library: called so, without children, no parameter beyond 1-D."""
    called_so = "norm" in type(module).__name__.lower()
    return called_so and not any(module.children()) and all(p.ndim <= 1 for p in module.parameters())


def hidden_of(output: Any, shape: torch.Size) -> Tensor:
    """The hidden state in a module's output (a tensor, or the first fitting one of a tuple), viewed as `shape`."""
    for item in output if isinstance(output, (tuple, list)) else (output,):
        if isinstance(item, Tensor) and item.numel() == math.prod(shape):
            return item.reshape(shape)
    raise UserError(
        f"a block returned no tensor of the shape {list(shape)} that it was given; it is not a decoder block."
    )


def run_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """The block's output [b, T, H] for `hidden` [b, T, H], which is moved to the block's device first."""
    args, kwargs = arguments
    hidden = to_block(hidden, block)
    if HIDDEN in kwargs:
        output = block(*args, **{**kwargs, HIDDEN: hidden})
    else:
        output = block(hidden, *args, **kwargs)
    return hidden_of(output, hidden.shape)


@torch.no_grad()
def outputs(
    run: Callable[..., Tensor],
    hidden: Iterable[Tensor],
    arguments: Callable[[Sequence[int]], Any],
) -> Iterator[Tensor]:
    """What `run` (a unit, or a block) gives for each window in turn: hidden states [1, T, H] in and out.

    `arguments(window_ids)`: what it is called with beside them.
    """
    for window, state in enumerate(hidden):
        yield run(state, arguments([window]))


class Calls:
    """What a model's blocks are called with for given windows of text, whatever the blocks' signature.

    A short real forward shows what each block returns. After that the blocks are stubbed (hidden states go through
    unchanged), so that a forward costs the embedding, the masks and the rotary tables only; it ends at the last block.

    `hidden`: the inputs of block 0, [1, T, H] each, one per window, in what `activations` has made. It is the caller's
    to overwrite as the windows advance from block to block.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        enter: Enter | None = None,
        activations: Callable[[], MutableSequence[Tensor]] = InMemory,
        forms: list[_Output] | None = None,
    ) -> None:
        """`windows`: token ids, int64 [n, T], n >= 1. The model must be in eval mode: no dropout, no checkpointing.

        `enter` brings a block's weights for those that are not in memory. `forms`: what the short forward showed of the
        same model, for calls with other windows. UserError where the blocks do not run once each and in order, hand
        each other more than the hidden state, or give NaN or infinite values.
        """
        if windows.ndim != 2 or not windows.numel():
            raise UserError(f"the windows are {list(windows.shape)}; at least one window of tokens [n, T] is needed.")
        self._model, self._windows = model, windows
        self.enter = enter or (lambda index: nullcontext())
        _, self._blocks = find_blocks(model)
        self.forms: list[_Output] = forms or []
        if not forms:
            self._learn(windows[:1, :SHORT])
        self._fixed = True
        self._known: dict[int, list[Arguments]] = {}
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}
        self.hidden = activations()
        for window in windows.split(1):
            hidden, arguments = self._stubbed(window)
            self.hidden.append(hidden)
            self._fixed = self._fixed and _equal(self._known.setdefault(1, arguments), arguments)

    @torch.no_grad()
    def arguments(self, block_index: int, window_ids: Sequence[int]) -> Arguments:
        """What block `block_index` is called with, beside the hidden state, for the batch of these windows.

        Where the windows were all called alike, the arguments of a batch size are made once and kept. Their tensors are
        on the block's device, wherever the rest of the model is.
        """
        size = len(window_ids)
        device = self._place(block_index)
        if not self._fixed:
            return _on(device, self._stubbed(self._windows[list(window_ids)])[1][block_index], {})
        if size not in self._known:
            self._known[size] = self._stubbed(self._windows[list(window_ids)])[1]
        return _on(device, self._known[size][block_index], self._moved)

    def advance(self, index: int) -> None:
        """`hidden`, the inputs of block `index`, becomes its outputs."""
        run = partial(run_block, self._blocks[index])
        for window, output in enumerate(outputs(run, self.hidden, partial(self.arguments, index))):
            self.hidden[window] = output

    @contextmanager
    def ended(self, window: int | None = None) -> Iterator[None]:
        """For the duration, no block computes: the last one gives this window's `hidden`, as advanced beyond it.

        So a forward of the model with this window is what its end makes of them. None: the last hands its input on.
        """

        def replace(index: int, _: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = _split(args, kwargs)[0]
                if window is not None and index + 1 == len(self._blocks):
                    hidden = self.hidden[window].to(hidden.device)
                return self._as_output(index, hidden)

            return forward

        with replaced_forwards(list(self._blocks), replace):
            yield

    def _learn(self, ids: Tensor) -> None:
        """Run the real blocks once; learn what they return, and check that each can be run alone."""
        real: list[Tensor] = []
        refused = UserError(
            f"the blocks of {type(self._model).__name__} hand each other more than the hidden state; "
            "perp can only run blocks that do not."
        )

        def answer(index: int, hidden: Tensor, run: Callable[[Tensor], Any]) -> Any:
            given = hidden.clone()
            with self.enter(index):
                output = run(hidden)
                real.append(hidden_of(output, hidden.shape))
                self.forms.append(_structure(output, real[-1]))
                if not real[-1].isfinite().all():
                    raise UserError(
                        f"{type(self._model).__name__} computes NaN or infinite activations as {hidden.dtype}; "
                        "load it in a wider dtype."
                    )
                if not close(hidden_of(run(given), given.shape), real[-1]):
                    raise refused
            return output

        calls: list[_Call] = []
        self._walk(ids, answer, calls)
        _, stubbed = self._stubbed(ids)
        for index, ((hidden, arguments), called) in enumerate(zip(calls, stubbed, strict=True)):
            if not _equal(arguments, called):
                with self.enter(index):
                    # A copy, since a block may leave something in its arguments for those after it.
                    own = _on(self._place(index), copy.deepcopy(called), {})
                    try:
                        alone = run_block(self._blocks[index], hidden, own)
                    except (LookupError, TypeError, AttributeError) as error:  # and these find nothing
                        raise refused from error
                    if not close(alone.to(hidden.device), real[index]):
                        raise refused

    def _place(self, index: int) -> torch.device:
        return next(self._blocks[index].parameters()).device

    def _as_output(self, index: int, hidden: Tensor) -> Any:
        """`hidden` in the form in which block `index` returns it."""
        structure = self.forms[index]
        if structure is None:
            return hidden
        items, position = structure
        return (*items[:position], hidden, *items[position + 1 :])

    def _stubbed(self, ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """The input of block 0 and the arguments of every block for these token ids."""

        calls: list[_Call] = []
        self._walk(ids, lambda index, hidden, run: self._as_output(index, hidden), calls)
        return calls[0][0], [arguments for _, arguments in calls]

    def _walk(
        self, ids: Tensor, answer: Callable[[int, Tensor, Callable[[Tensor], Any]], Any], calls: list[_Call]
    ) -> None:
        """Run the model up to its last block, and append to `calls` what each block is called with.

        `answer(index, hidden, run)` stands in for the forward of each block; `run(hidden)` is the real one.
        """

        def replace(index: int, run: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if index != len(calls):
                    raise UserError(f"{type(self._model).__name__} does not run each block once and in order.")
                calls.append(_split(args, kwargs))
                hidden, arguments = calls[-1]

                def real(given: Tensor) -> Any:
                    args, kwargs = _on(self._place(index), arguments, {})
                    given = given.to(self._place(index))
                    called = (
                        run(*args, **{**kwargs, HIDDEN: given}) if HIDDEN in kwargs else run(given, *args, **kwargs)
                    )
                    return _on(hidden.device, called, {})

                output = answer(index, hidden, real)
                if len(calls) == len(self._blocks):
                    raise Stop
                return output

            return forward

        device = self._model.get_input_embeddings().weight.device
        with replaced_forwards(list(self._blocks), replace), suppress(Stop):
            self._model(input_ids=ids.to(device), use_cache=False)
        if len(calls) != len(self._blocks):
            raise UserError(f"{type(self._model).__name__} runs {len(calls)} of its {len(self._blocks)} blocks.")


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two results of the same computation differ by no more than a few roundings of the largest element."""
    return bool((one - other).abs().max() <= 16 * torch.finfo(one.dtype).eps * other.abs().max())


def to_block(hidden: Tensor, block: nn.Module) -> Tensor:
    """`hidden` on the device of the block."""
    return hidden.to(next(block.parameters()).device, non_blocking=True)


@contextmanager
def replaced_forwards(
    modules: Sequence[nn.Module], replace: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """For the duration, the forward of each module is `replace(its index, its own forward)`."""
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = replace(index, module.forward)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    """The hidden state of a block's call and the rest; a cache the model made all the same is left out."""
    kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    args = tuple(None if isinstance(value, Cache) else value for value in args)
    if HIDDEN in kwargs:
        return kwargs[HIDDEN], (args, {**kwargs, HIDDEN: None})
    if not args or not isinstance(args[0], Tensor):
        raise UserError(f"a block is called without a hidden state, neither first nor as {HIDDEN}; perp cannot run it.")
    return args[0], (args[1:], kwargs)


def _structure(output: Any, hidden: Tensor) -> _Output:
    """What stands around the hidden state in a block's output; tensors other than it are not kept."""
    if isinstance(output, Tensor):
        return None
    at = next(i for i, item in enumerate(output) if isinstance(item, Tensor) and item.data_ptr() == hidden.data_ptr())
    return tuple(None if isinstance(item, Tensor) else item for item in output), at


def _equal(one: Any, other: Any) -> bool:
    """Whether two captured values are the same: tensors by dtype, shape and content, containers item by item."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return isinstance(one, (bool, int, float, str)) and one == other


def _on(device: torch.device, value: Any, moved: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """`value` with its tensors on the device, itself where they are; `moved` keeps each with its copy, made once."""
    if isinstance(value, Tensor):
        if value.device == device:
            return value
        if id(value) not in moved:
            moved[id(value)] = value, value.to(device)
        return moved[id(value)][1]
    if type(value) in (tuple, list):
        items = [_on(device, item, moved) for item in value]
        return value if all(map(operator.is_, items, value)) else type(value)(items)
    if type(value) is dict:
        named = {key: _on(device, item, moved) for key, item in value.items()}
        return value if all(named[key] is value[key] for key in value) else named
    return value
