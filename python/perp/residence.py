"""Where a model's blocks, masks and activations are while it is pruned: all in memory, or one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from perp.activations import InMemory
from perp.blocks import Calls
from perp.finished import Finished
from perp.reconstruct import Losses
from perp.stream import Stream
from perp.units import Unit


class Residence(Protocol):
    """What `perp.prune.prune_model` asks for, in this order for each block: enter, the units, leave."""

    masks: MutableMapping[str, Tensor]
    """By qualified name of the linear, bool [out, in], True = kept; those of the block in hand are in memory."""

    def calls(self, model: PreTrainedModel, windows: Tensor) -> Calls:
        """The calls of the model's blocks for these windows."""

    def states(self) -> MutableSequence[Tensor]:
        """An empty sequence for the hidden states of all windows."""

    def enter(self, index: int) -> AbstractContextManager[None]:
        """Has the block's weights in memory for the duration."""

    def has(self, unit: Unit) -> bool:
        """Whether the unit was finished by an earlier run."""

    def restore(self, unit: Unit) -> Losses | None:
        """Put the weights and masks of a finished unit in place; its losses, if it was reconstructed."""

    def keep(self, unit: Unit, losses: Losses | None) -> None:
        """The unit is finished, others of its block are not."""

    def leave(self, index: int, parts: Sequence[Unit], losses: Mapping[str, Losses]) -> None:
        """All units of the block are finished."""


class Resident:
    """Everything stays in memory."""

    def __init__(self) -> None:
        self.masks: MutableMapping[str, Tensor] = {}

    def calls(self, model: PreTrainedModel, windows: Tensor) -> Calls:
        return Calls(model, windows)

    def states(self) -> MutableSequence[Tensor]:
        return InMemory()

    def enter(self, index: int) -> AbstractContextManager[None]:
        return nullcontext()

    def has(self, unit: Unit) -> bool:
        return False

    def restore(self, unit: Unit) -> Losses | None:
        raise AssertionError("nothing was finished before")

    def keep(self, unit: Unit, losses: Losses | None) -> None: ...

    def leave(self, index: int, parts: Sequence[Unit], losses: Mapping[str, Losses]) -> None: ...


class Streamed:
    """One block at a time is in memory; what is finished is in a `Finished`."""

    def __init__(
        self, stream: Stream, stage: Finished, states: Callable[[], MutableSequence[Tensor]] = InMemory
    ) -> None:
        """`states` makes an empty sequence for the hidden states of all windows."""
        self._stream, self._stage, self._states = stream, stage, states
        self.masks: MutableMapping[str, Tensor] = {}
        self._finished: tuple[int, nn.Module] | None = None

    def calls(self, model: PreTrainedModel, windows: Tensor) -> Calls:
        return self._stream.calls(windows, self._states)

    def states(self) -> MutableSequence[Tensor]:
        return self._states()

    def enter(self, index: int) -> AbstractContextManager[None]:
        return self._stream.enter(index)

    def has(self, unit: Unit) -> bool:
        return self._stage.has_block(_index(unit)) or self._stage.has_unit(unit.name)

    def restore(self, unit: Unit) -> Losses | None:
        index = _index(unit)
        if self._stage.has_block(index):
            if self._finished is None or self._finished[0] != index:
                self._finished = index, self._stream.load(index, self._stage.tensors(index))
            for name, module in _modules(unit).items():
                # Copies, which begin at a multiple of 64 bytes as the results of the run that is gone on with did:
                # what a product gives may depend on that.
                put(module, dict(self._finished[1].get_submodule(name).named_parameters(recurse=False)))
            return self._stage.losses(index).get(unit.name)
        tensors, masks, losses = self._stage.read_unit(unit.name)
        for name, module in _modules(unit).items():
            put(module, {own: tensors[f"{name}.{own}"] for own, _ in module.named_parameters(recurse=False)})
        self.masks.update(masks)
        return losses

    def keep(self, unit: Unit, losses: Losses | None) -> None:
        weights = {
            f"{name}.{own}": weight
            for name, module in _modules(unit).items()
            for own, weight in module.named_parameters(recurse=False)
        }
        self._stage.write_unit(unit.name, weights, {name: self.masks[name] for name in unit.linears}, losses)

    def leave(self, index: int, parts: Sequence[Unit], losses: Mapping[str, Losses]) -> None:
        if not self._stage.has_block(index):
            own = {unit.name: losses[unit.name] for unit in parts if unit.name in losses}
            self._stage.write_block(index, lambda path: self._stream.write(index, path), self.masks, own)
        for unit in parts:
            self._stage.forget_unit(unit.name)
        self.masks.clear()
        self._finished = None


def put(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the module copies of these parameters."""
    for name, weight in weights.items():
        own = getattr(module, name)
        setattr(module, name, nn.Parameter(weight.detach().to(own.device).clone(), requires_grad=own.requires_grad))


def _index(unit: Unit) -> int:
    return int(unit.prefix.rpartition(".")[2])


def _modules(unit: Unit) -> dict[str, nn.Module]:
    """What changes when the unit is pruned and fitted, by the names in its block."""
    return {name: unit.block.get_submodule(name) for name in (*unit.linear_names, *unit.norm_names)}
