"""Where a model's blocks, masks and activations are while it is pruned, and what of it is written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from perp.activations import InMemory
from perp.blocks import Calls, find_blocks
from perp.figures import Figures
from perp.files import commit
from perp.finished import Finished, Masks
from perp.stream import Stream
from perp.units import Unit
from perp_kernels import Pattern


class Residence(Protocol):
    """What `perp.prune.prune_model` asks for, in this order for each block: enter, the units, leave."""

    masks: MutableMapping[str, Tensor]
    """By qualified name of the linear, bool [out, in], True = kept; those of the block in hand are in memory."""

    def complete(self, count: int) -> bool:
        """Whether all `count` blocks were finished by an earlier run."""

    def adopt(self, count: int) -> Figures:
        """Put all blocks in place, which are finished; their figures."""

    def patterns(self, make: Callable[[], list[Pattern]]) -> list[Pattern]:
        """The pattern of each block, made unless an earlier run has."""

    def calls(self, model: PreTrainedModel, windows: Tensor) -> Calls:
        """The calls of the model's blocks for these windows."""

    def states(self) -> MutableSequence[Tensor]:
        """An empty sequence for the hidden states of all windows."""

    def enter(self, index: int) -> AbstractContextManager[None]:
        """Has the block's weights in memory for the duration."""

    def has(self, unit: Unit) -> bool:
        """Whether the unit was finished by an earlier run."""

    def restore(self, unit: Unit) -> Figures:
        """Put the weights and masks of a finished unit in place; its figures."""

    def keep(self, unit: Unit, figures: Figures) -> None:
        """The unit is finished, others of its block are not."""

    def leave(self, index: int, parts: Sequence[Unit], figures: Figures) -> None:
        """All units of the block are finished."""


class Resident:
    """Everything stays in memory, and nothing is written."""

    def __init__(self) -> None:
        self.masks: MutableMapping[str, Tensor] = {}

    def complete(self, count: int) -> bool:
        return False

    def adopt(self, count: int) -> Figures:
        raise AssertionError("nothing was finished before")

    def patterns(self, make: Callable[[], list[Pattern]]) -> list[Pattern]:
        return make()

    def calls(self, model: PreTrainedModel, windows: Tensor) -> Calls:
        return Calls(model, windows)

    def states(self) -> MutableSequence[Tensor]:
        return InMemory()

    def enter(self, index: int) -> AbstractContextManager[None]:
        return nullcontext()

    def has(self, unit: Unit) -> bool:
        return False

    def restore(self, unit: Unit) -> Figures:
        raise AssertionError("nothing was finished before")

    def keep(self, unit: Unit, figures: Figures) -> None: ...

    def leave(self, index: int, parts: Sequence[Unit], figures: Figures) -> None: ...


class Recorded(Resident):
    """Everything stays in memory, and what is finished is written into a `Finished`, by the names in its block."""

    def __init__(self, model: PreTrainedModel, stage: Finished) -> None:
        super().__init__()
        self.prefix, self.blocks = find_blocks(model)
        self.stage = stage
        stage.begin()
        self._read: tuple[int, Mapping[str, Tensor]] | None = None

    def complete(self, count: int) -> bool:
        return all(map(self.stage.has_block, range(count)))

    def adopt(self, count: int) -> Figures:
        figures = Figures()
        for index in range(count):
            tensors = self._tensors(index)
            for name, module in self.blocks[index].named_modules():
                put(module, {own: tensors[f"{name}.{own}".lstrip(".")] for own in _own(module)})
            figures.add(self.stage.figures(index))
        self.masks.update(self.stage.all_masks(count))
        return figures

    def patterns(self, make: Callable[[], list[Pattern]]) -> list[Pattern]:
        found = self.stage.patterns(len(self.blocks))
        if found is None:
            found = make()
            self.stage.write_patterns(found)
        return found

    def has(self, unit: Unit) -> bool:
        return self.stage.has_block(_index(unit)) or self.stage.has_unit(unit.name)

    def restore(self, unit: Unit) -> Figures:
        index = _index(unit)
        if self.stage.has_block(index):
            if self._read is None or self._read[0] != index:
                self._read = index, self._tensors(index)
            tensors, finished = self._read[1], Masks(self.stage.masks(index))
            masks = {name: finished[name] for name in unit.linears}
            figures = self.stage.figures(index).of([unit])
        else:
            tensors, masks, figures = self.stage.read_unit(unit.name)
        for name, module in _modules(unit).items():
            put(module, {own: tensors[f"{name}.{own}"] for own in _own(module)})
        self.masks.update(masks)
        return figures

    def keep(self, unit: Unit, figures: Figures) -> None:
        weights = {
            f"{name}.{own}": weight
            for name, module in _modules(unit).items()
            for own, weight in module.named_parameters(recurse=False)
        }
        self.stage.write_unit(unit.name, weights, {name: self.masks[name] for name in unit.linears}, figures)

    def leave(self, index: int, parts: Sequence[Unit], figures: Figures) -> None:
        if not self.stage.has_block(index):
            own = f"{self.prefix}.{index}."
            masks = {name: mask for name, mask in self.masks.items() if name.startswith(own)}
            self.stage.write_block(index, lambda path: self._write(index, path), masks, figures)
        for unit in parts:
            self.stage.forget_unit(unit.name)
        self._read = None

    def _tensors(self, index: int) -> Mapping[str, Tensor]:
        """The parameters of a finished block by their names in it."""
        return load_file(self.stage.weights(index))

    def _write(self, index: int, path: Path) -> None:
        written = path.with_name(f".{path.name}")
        weights = {name: weight.detach().cpu().contiguous() for name, weight in self.blocks[index].named_parameters()}
        save_file(weights, written)
        commit(written, path)


class Streamed(Recorded):
    """One block at a time is in memory; what is finished is in a `Finished`, by the names of the model's files."""

    def __init__(
        self, stream: Stream, stage: Finished, states: Callable[[], MutableSequence[Tensor]] = InMemory
    ) -> None:
        """`states` makes an empty sequence for the hidden states of all windows."""
        super().__init__(stream.model, stage)
        self._stream, self._states = stream, states

    def adopt(self, count: int) -> Figures:
        """The blocks stay where they are."""
        figures = Figures()
        for index in range(count):
            figures.add(self.stage.figures(index))
        return figures

    def calls(self, model: PreTrainedModel, windows: Tensor) -> Calls:
        return self._stream.calls(windows, self._states)

    def states(self) -> MutableSequence[Tensor]:
        return self._states()

    def enter(self, index: int) -> AbstractContextManager[None]:
        return self._stream.enter(index)

    def leave(self, index: int, parts: Sequence[Unit], figures: Figures) -> None:
        super().leave(index, parts, figures)
        for name in [name for name in self.masks if name.startswith(f"{self.prefix}.{index}.")]:
            del self.masks[name]

    def _tensors(self, index: int) -> Mapping[str, Tensor]:
        return dict(self._stream.load(index, self.stage.tensors(index)).named_parameters())

    def _write(self, index: int, path: Path) -> None:
        self._stream.write(index, path)


def put(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the module copies of these parameters.

    They begin at a multiple of 64 bytes and are laid out row by row, as the results of the run that is gone on with
    were: what a product gives may depend on that.
    """
    for name, weight in weights.items():
        own = getattr(module, name)
        copy = torch.empty(weight.shape, dtype=weight.dtype, device=own.device).copy_(weight.detach())
        setattr(module, name, nn.Parameter(copy, requires_grad=own.requires_grad))


def _own(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


def _index(unit: Unit) -> int:
    return int(unit.prefix.rpartition(".")[2])


def _modules(unit: Unit) -> dict[str, nn.Module]:
    """What changes when the unit is pruned and fitted, by the names in its block."""
    return {name: unit.block.get_submodule(name) for name in (*unit.linear_names, *unit.norm_names)}
