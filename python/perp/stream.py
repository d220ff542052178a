"""A causal language model whose blocks stay in the files of its directory, and are in memory one at a time.

The model is built without data. Everything outside the blocks is loaded at once; a block is loaded by a shell of the
model that has nothing else, so that transformers' own loading does the rest for the weights of that block: names and
fused tensors converted, dtypes cast, tables that are in no file computed. What is loaded as it is stays mapped from its
file. A shell saves a block in the names of the files as well.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, MutableSequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from perp import models, shards
from perp.activations import InMemory
from perp.ahead import Ahead
from perp.blocks import Calls, find_blocks
from perp.errors import UserError
from perp.experts import closed, is_open, open_experts
from perp.files import commit
from perp.models import WEIGHTS, check_finite, quiet, save_weights
from perp.shards import Shards, Slices

# The files of finished blocks stand in for the model's own: the number of a block -> its tensors by their names there.
Source = Callable[[int], Slices]


class Stream:
    """`model` is a model of transformers whose blocks have no data but for the one that is entered."""

    def __init__(
        self,
        name: str,
        dtype: torch.dtype | str | None = None,
        device: str = "cpu",
        trust_remote_code: bool = False,
        ahead: bool = False,
    ) -> None:
        """The model `name` as `perp.load` takes it; UserError for what that refuses by files and configuration.

        `ahead`: while a block is entered, the next one is read, which takes the memory of one more.
        """
        models.check_model(name, trust_remote_code)
        self.name, self.device = name, torch.device(device)
        source = models.source(name)
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            self._kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
        without = _Without()
        self.model = models.load_weights(name, _variant(self._kind, without), dtype, trust_remote_code)
        self.model.__class__ = self._kind
        self.prefix, self.blocks = without.prefix, without.blocks
        self._put(self.blocks.eval())
        check_finite(self.model, name)
        self.directory = models.directory(name)
        self.shards = Shards(self.directory)
        self._own: dict[int, list[str]] = {}
        for key in self.shards:
            if (number := shards.number(key)) is not None:
                self._own.setdefault(number, []).append(key)
        self._source: Source = self._from_shards
        self._checked: set[int] = set()
        self._forms: list[Any] | None = None
        self._shells: dict[int, Any] = {}
        self._ahead = Ahead(self.device) if ahead else None

    def calls(self, windows: Tensor, states: Callable[[], MutableSequence[Tensor]] = InMemory) -> Calls:
        """What the blocks are called with for these windows; the first call reads every block once."""
        calls = Calls(self.model, windows, self.enter, states, self._forms)
        self._forms = calls.forms
        return calls

    @contextmanager
    def enter(self, index: int) -> Iterator[None]:
        """Has block `index` in memory for the duration; it may be entered again while it is.

        Where the model's experts are open (`perp.experts`), so are those of the block.
        """
        if index in self._shells:
            yield
            return
        self._shells[index] = self._taken(index)
        loaded = self._in_shell(index)
        adopt(self.blocks[index], loaded)
        for module in loaded.modules():
            # Else the shell would hold on to weights that the block has given up.
            module._parameters.update(dict.fromkeys(module._parameters))
        try:
            self._begin(index + 1)
            if index not in self._checked:
                check_finite(self.blocks[index], f"block {index} of {self.name}")
                self._checked.add(index)
            yield
        except BaseException:
            if self._ahead:
                self._ahead.drop()
            raise
        finally:
            del self._shells[index]
            self.blocks[index].to("meta")

    @contextmanager
    def reading(self, source: Source) -> Iterator[None]:
        """For the duration, blocks come from `source`."""
        before, self._source = self._source, source
        checked, self._checked = self._checked, set()
        try:
            yield
        finally:
            self._source, self._checked = before, checked

    def write(self, index: int, path: Path) -> None:
        """The entered block as a safetensors file in the names of the model's files, whole or not at all."""
        adopt(self._in_shell(index), self.blocks[index])
        staging = path.with_name(f".{path.name}.new")
        shutil.rmtree(staging, ignore_errors=True)
        try:
            with closed(self._in_shell(index)):
                # In one file whatever its size: what is cut in several has names of its own.
                save_weights(self._shells[index], staging, max_shard_size=1 << 62)
            commit(staging / WEIGHTS, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def write_rest(self, directory: Path) -> None:
        """The model's configuration, and all that is outside the blocks, as a model directory."""
        self._put(nn.ModuleList(nn.Module() for _ in self.blocks))
        try:
            save_weights(self.model, directory, max_shard_size=1 << 62)
        finally:
            self._put(self.blocks)

    def load(self, index: int, tensors: Mapping[str, Any]) -> nn.Module:
        """Block `index` of these tensors, as a module of its own; its experts are open where the model's are."""
        return self._load(index, tensors).get_submodule(f"{self.prefix}.{index}")

    @contextmanager
    def rest_on_device(self) -> Iterator[None]:
        """For the duration, all that is outside the blocks is on the device as well."""
        tensors = [tensor for tensor in (*self.model.parameters(), *self.model.buffers()) if not tensor.is_meta]
        before = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device)
            yield
        finally:
            for tensor, data in zip(tensors, before, strict=True):
                tensor.data = data

    def _taken(self, index: int) -> Any:
        """Block `index` in a shell on the device, as it was read ahead or read now."""
        found = self._ahead.take((self._source, index)) if self._ahead else None
        return self._load(index, self._source(index)) if found is None else found

    def _begin(self, index: int) -> None:
        if self._ahead and index < len(self.blocks):
            source = self._source
            tensors = source(index)
            self._ahead.start((source, index), partial(self._shell, index, tensors), tensors.places)

    def _in_shell(self, index: int) -> nn.Module:
        return self._shells[index].get_submodule(f"{self.prefix}.{index}")

    def _from_shards(self, index: int) -> Slices:
        return self.shards.slices(self._own.get(index, ()))

    def _put(self, blocks: nn.ModuleList) -> None:
        parent, _, own = self.prefix.rpartition(".")
        setattr(self.model.get_submodule(parent), own, blocks)

    def _load(self, index: int, tensors: Mapping[str, Any]) -> Any:
        return self._shell(index, tensors).to(self.device)

    def _shell(self, index: int, tensors: Mapping[str, Any]) -> Any:
        """A shell with block `index` alone, of these tensors, in memory."""
        with quiet():
            shell, report = _variant(self._kind, _Only(index)).from_pretrained(
                None,
                config=self.model.config,
                state_dict=dict(tensors),
                dtype=self.model.dtype,
                output_loading_info=True,
            )
        if missing := sorted(key for key in report["missing_keys"] if key.startswith(f"{self.prefix}.")):
            raise UserError(f"{self.name} lacks {missing[0]}; use a complete checkpoint.")
        if any(map(is_open, self.blocks[index].modules())):
            open_experts(shell)
        return shell.eval()


def adopt(block: nn.Module, other: nn.Module) -> None:
    """Give `block` the parameters and buffers of `other`, which is built alike."""
    for name, module in other.named_modules():
        own = block.get_submodule(name)
        own._parameters.update(module._parameters)
        own._buffers.update(module._buffers)


class _Without:
    """Takes the blocks out of a model, and keeps them."""

    def __call__(self, model: Any) -> None:
        self.prefix, self.blocks = find_blocks(model)
        parent, _, own = self.prefix.rpartition(".")
        setattr(model.get_submodule(parent), own, nn.ModuleList(nn.Module() for _ in self.blocks))


class _Only:
    """Leaves a model one block, and of everything else what has no weights."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __call__(self, model: Any) -> None:
        prefix, blocks = find_blocks(model)
        for index in range(len(blocks)):
            if index != self._index:
                blocks[index] = nn.Module()
        path = prefix.split(".")
        module = model
        for step in path:
            for name in module._parameters:
                module._parameters[name] = None
            for name, child in module.named_children():
                if name != step and any(True for _ in child.parameters()):
                    setattr(module, name, nn.Module())
            module = module.get_submodule(step)
        model.all_tied_weights_keys = {}


def _variant(kind: type, cut: Callable[[Any], None]) -> Any:
    """The model class `kind` of which `cut` takes parts away as soon as it is built.

    As a class, so that transformers' own loading serves what is left.
    """

    def build(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        kind.__init__(self, config, *arguments, **options)  # type: ignore[misc]
        cut(self)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})
