"""The finished blocks and units of one pass over a model, in a directory of its own: what a second run goes on from.

block-00003.safetensors        a finished block, its tensors named as in the model's files
block-00003.masks.safetensors  its masks: `perp.masks`
block-00003.json               checksums of both, and the losses of its units; written last: then the block counts
unit-NAME.safetensors          a finished unit of the block in hand: weights "LAYER.weight" by their names in the block,
                               masks "mask:LAYER"; metadata "perp-unit": a JSON object of their shapes and the loss
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perp import masks as mask_files
from perp import shards
from perp.errors import UserError
from perp.files import commit, write_json
from perp.reconstruct import Losses

_UNIT = "perp-unit"
_MASK = "mask:"


class Finished:
    """`made`: how many units this process has finished here, told by tests and by the run's last line."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.made = 0
        self._verified: set[int] = set()

    def has_block(self, index: int) -> bool:
        return self._block(index, ".json").exists()

    def write_block(
        self, index: int, write: Callable[[Path], None], masks: Mapping[str, Tensor], losses: Mapping[str, Losses]
    ) -> None:
        """`write(path)` writes the block's weights as a file that is whole or absent."""
        weights, bits = self._block(index), self._block(index, ".masks.safetensors")
        write(weights)
        written = bits.with_name(f".{bits.name}")
        mask_files.write(masks, written)
        commit(written, bits)
        told = {
            "checksums": [shards.checksum(weights), shards.checksum(bits)],
            "losses": {name: _to_json(loss) for name, loss in losses.items()},
        }
        write_json(told, self._block(index, ".json"))
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

    def losses(self, index: int) -> dict[str, Losses]:
        """Those of the block's units that were reconstructed, by name."""
        return {name: _from_json(told) for name, told in self._about(index)["losses"].items()}

    def has_unit(self, name: str) -> bool:
        return self._unit(name).exists()

    def write_unit(
        self, name: str, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], losses: Losses | None
    ) -> None:
        """A finished unit of a block that is not finished."""
        about = {
            "shapes": {layer: list(mask.shape) for layer, mask in masks.items()},
            "loss": losses and _to_json(losses),
        }
        tensors = {layer: weight.detach().cpu().contiguous() for layer, weight in weights.items()}
        tensors |= {f"{_MASK}{layer}": mask_files.pack(mask)[0] for layer, mask in masks.items()}
        path = self._unit(name)
        written = path.with_name(f".{path.name}")
        save_file(tensors, written, metadata={_UNIT: json.dumps(about)})
        commit(written, path)
        self.made += 1

    def read_unit(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Losses | None]:
        """The weights by their names in the block, the masks by qualified name of the layer, and the losses."""
        try:
            with safe_open(self._unit(name), framework="pt") as file:
                about = json.loads(file.metadata()[_UNIT])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            masks = {
                layer: mask_files.unpack(tensors.pop(f"{_MASK}{layer}"), tuple(shape))
                for layer, shape in about["shapes"].items()
            }
            return tensors, masks, about["loss"] and _from_json(about["loss"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
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
            _ = about["checksums"][1], about["losses"].items()
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


def _to_json(losses: Losses) -> dict[str, Any]:
    return {name: value if value is None or math.isfinite(value) else None for name, value in asdict(losses).items()}


def _from_json(told: Mapping[str, Any]) -> Losses:
    after = math.nan if told["after"] is None else told["after"]
    return Losses(told["before"], after, told["restored"], told["unmerged"])
