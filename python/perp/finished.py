"""The finished blocks and units of one pass over a model, in a directory of its own: what a second run goes on from.

block-00003.safetensors        a finished block, its tensors named as in the model's files if it was streamed, else as
                               in the block
block-00003.masks.safetensors  its masks: `perp.masks`
block-00003.json               checksums of both, and the figures of its units; written last: then the block counts
unit-NAME.safetensors          a finished unit of the block in hand: weights "LAYER.weight" by their names in the block,
                               masks "mask:LAYER"; metadata "perp-unit": a JSON object of their shapes and its figures
patterns.json                  the pattern of each block, where they are not alike
retrain.pt                     the training that follows: `perp.resume`
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perp import masks as mask_files
from perp import shards
from perp.errors import UserError
from perp.figures import Figures
from perp.files import commit, write_json, writing
from perp_kernels import Pattern, PatternError

_UNIT = "perp-unit"
_MASK = "mask:"
_PATTERNS = "patterns.json"


class Finished:
    """`made`: how many units this process has finished here, told by tests and by the run's last line."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made = 0
        self._verified: set[int] = set()

    @property
    def training(self) -> Path:
        """The file of the training that follows."""
        return self.directory / "retrain.pt"

    def patterns(self, count: int) -> list[Pattern] | None:
        """The pattern of each of `count` blocks, if they were written."""
        path = self.directory / _PATTERNS
        if not path.exists():
            return None
        try:
            patterns = [Pattern.parse(text) for text in json.loads(path.read_text(encoding="utf-8"))]
            if len(patterns) != count:
                raise ValueError(f"{len(patterns)} patterns are of another model")
            return patterns
        except (OSError, ValueError, TypeError, AttributeError, PatternError) as error:
            raise UserError(f"{path} is damaged; delete it and run again.") from error

    def begin(self) -> None:
        """Make the directory, which what is written goes into."""
        self.directory.mkdir(parents=True, exist_ok=True)

    def write_patterns(self, patterns: Sequence[Pattern]) -> None:
        write_json([str(pattern) for pattern in patterns], self.directory / _PATTERNS)

    def has_block(self, index: int) -> bool:
        return self._block(index, ".json").exists()

    def write_block(
        self, index: int, write: Callable[[Path], None], masks: Mapping[str, Tensor], figures: Figures
    ) -> None:
        """`write(path)` writes the block's weights as a file that is whole or absent."""
        weights, bits = self._block(index), self._block(index, ".masks.safetensors")
        with writing(self.directory):
            write(weights)
            written = bits.with_name(f".{bits.name}")
            mask_files.write(masks, written)
            commit(written, bits)
            checksums = [shards.checksum(weights), shards.checksum(bits)]
            write_json({"checksums": checksums, **figures.to_json()}, self._block(index, ".json"))
        self._verified.add(index)
        self.made += 1

    def tensors(self, index: int) -> shards.Slices:
        """The tensors of a finished block, as slices by their names in the model's files."""
        self._verify(index)
        path = self._block(index)
        return shards.slices(dict.fromkeys(shards.header(path), path))

    def masks(self, index: int) -> dict[str, mask_files.Bits]:
        """The masks of a finished block as bits, with their shapes."""
        self._verify(index)
        return mask_files.read_bits(self._block(index, ".masks.safetensors"))

    def weights(self, index: int) -> Path:
        """The file of a finished block."""
        self._verify(index)
        return self._block(index)

    def figures(self, index: int) -> Figures:
        """Those of the block's units and linears."""
        return Figures.from_json(self._about(index))

    def has_unit(self, name: str) -> bool:
        return self._unit(name).exists()

    def write_unit(
        self, name: str, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], figures: Figures
    ) -> None:
        """A finished unit of a block that is not finished."""
        about = {"shapes": {layer: list(mask.shape) for layer, mask in masks.items()}, **figures.to_json()}
        tensors = {layer: weight.detach().cpu().contiguous() for layer, weight in weights.items()}
        tensors |= {f"{_MASK}{layer}": mask_files.pack(mask)[0] for layer, mask in masks.items()}
        path = self._unit(name)
        written = path.with_name(f".{path.name}")
        with writing(self.directory):
            save_file(tensors, written, metadata={_UNIT: json.dumps(about)})
            commit(written, path)
        self.made += 1

    def read_unit(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Figures]:
        """The weights by their names in the block, the masks by qualified name of the layer, and the figures."""
        try:
            with safe_open(self._unit(name), framework="pt") as file:
                about = json.loads(file.metadata()[_UNIT])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            masks = {
                layer: mask_files.unpack(tensors.pop(f"{_MASK}{layer}"), tuple(shape))
                for layer, shape in about["shapes"].items()
            }
            return tensors, masks, Figures.from_json(about)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(f"{self._unit(name)} is damaged ({error}); delete it and run again.") from error

    def forget_unit(self, name: str) -> None:
        """The unit's block is finished."""
        self._unit(name).unlink(missing_ok=True)

    def all_masks(self, count: int) -> Masks:
        """The masks of `count` finished blocks."""
        return Masks({name: told for index in range(count) for name, told in self.masks(index).items()})

    def _verify(self, index: int) -> None:
        """Once for each block that an earlier process wrote: UserError where its files are not what it wrote."""
        if index in self._verified:
            return
        paths = self._block(index), self._block(index, ".masks.safetensors")
        for path, expected in zip(paths, self._about(index)["checksums"], strict=True):
            if not path.is_file() or shards.checksum(path) != expected:
                raise UserError(
                    f"{path} is not what this run wrote; delete {self._block(index, '.json')} and run again."
                )
        self._verified.add(index)

    def _about(self, index: int) -> Any:
        path = self._block(index, ".json")
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            weights, masks = about["checksums"]
            if not all(type(checksum) is int for checksum in (weights, masks)):
                raise TypeError("checksums are integers")
            Figures.from_json(about)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged; delete it and run again.") from error
        return about

    def _block(self, index: int, suffix: str = ".safetensors") -> Path:
        return self.directory / f"block-{index:05}{suffix}"

    def _unit(self, name: str) -> Path:
        return self.directory / f"unit-{re.sub('[^A-Za-z0-9.]+', '-', name)}.safetensors"


class Masks(Mapping[str, Tensor]):
    """Masks by qualified name of the layer, bool [N, K], each unpacked when it is asked for; `bits` are mapped."""

    def __init__(self, bits: dict[str, mask_files.Bits]) -> None:
        self.bits = bits

    def __getitem__(self, name: str) -> Tensor:
        return mask_files.unpack(*self.bits[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)
