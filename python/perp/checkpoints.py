"""Saving a pruned model as an ordinary Hugging Face directory with its masks, all of it or nothing.

OUT/                        what model.save_pretrained and the tokenizer write: any loader reads it without perp
OUT/perp.json               the manifest
OUT/perp/masks.safetensors  the masks: `perp.masks`
OUT/perp/packed.safetensors the pruned linears packed, if asked for: `perp.packed`
OUT/perp/adapter/           adapters that were kept unmerged: `perp.adapter_files`
OUT/perp/staging/           only while saving
OUT/perp/run.json           what an unfinished run is to go on from, with OUT/perp/stage-NAME/: `perp.record`
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from perp import adapter_files
from perp import manifest as manifests
from perp import masks as mask_files
from perp import packed as packed_files
from perp.adapter_files import ADAPTER
from perp.adapters import Adapter
from perp.blocks import find_blocks, prunable
from perp.errors import UserError
from perp.experts import linears
from perp.files import flush
from perp.linear import SparseLinear
from perp.lock import LOCK
from perp.models import check_finite, quiet, save_weights

STAGING = Path("perp", "staging")
MASKS = Path("perp", "masks.safetensors")
PACKED = packed_files.PACKED

# Top-level files of a model that loaders look for: what --overwrite takes away, even where the new model has none.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    manifests.NAME,
)


def check_output(out: str | Path, overwrite: bool = False, needed: int = 0) -> None:
    """Refuse, before any work, an output directory that could not be written at the end: UserError, one sentence.

    It must be absent or empty, unless `overwrite`, and have room for `needed` bytes. What a killed save or run left
    behind counts as empty.
    """
    out = Path(out)
    try:
        nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise UserError(
                f"{out} cannot be a directory because {nearest} is a file; choose another output directory."
            )
        if nearest == out and not overwrite and not _is_empty(out):
            raise UserError(f"{out} is not empty; choose another output directory or pass --overwrite.")
        with tempfile.TemporaryFile(dir=nearest):
            free = shutil.disk_usage(nearest).free
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another output directory.") from error
    if free < needed:
        raise UserError(
            f"{out} needs {needed / 1e9:.3g} GB but its disk has {free / 1e9:.3g} GB free; "
            "make room or choose another output directory."
        )


def size(model: nn.Module, packed: bool = False, stages: int = 0) -> int:
    """The bytes of a model's weights on the disk, at most, with those of its packed file and of its finished stages."""
    return sum(parameter.nbytes for parameter in model.parameters()) * (1 + packed + stages)


def save(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    masks: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
    overwrite: bool = False,
    packed: bool = False,
    adapters: Mapping[str, Adapter] | None = None,
) -> None:
    """Write the model, tokenizer, masks and manifest into `out`, which plain transformers then loads.

    With `packed` the packed file is written too, and `adapters` that do not merge beside the model; those of a model
    that was there before never stay.

    `masks`: qualified layer name -> bool [N, K], True = kept; every layer an nn.Linear again. Before writing, pruned
    weights must be exactly zero, all weights finite and the manifest's counts the masks'. Everything is staged and
    flushed first and then moved into place, config.json last; with `overwrite` the old model stays until then. On any
    failure, Ctrl-C included, `out` is as it was. UserError for all that is refused and for what the disk refuses.
    """
    out = Path(out)
    check_output(out, overwrite, size(model, packed))
    _check_model(model, masks, manifest)
    with staged(out) as staging:
        new = staging / "new"
        (new / MASKS).parent.mkdir(parents=True)
        _write_model(model, tokenizer, new)
        mask_files.write(masks, new / MASKS)
        if packed:
            _write_packed(model, masks, new / PACKED)
        if adapters:
            adapter_files.write(adapters, new / ADAPTER)
        manifests.write(manifest, new / manifests.NAME)
        finish(new, staging / "old", out)


def finish(new: Path, old: Path, out: Path) -> None:
    """Have all that is staged on the disk, and in place."""
    # safetensors makes its files readable by their owner alone, whatever the umask says.
    ordinary = (new / manifests.NAME).stat().st_mode
    for path in new.rglob("*"):
        if path.is_file():
            path.chmod(ordinary)
        flush(path)
    _move_into_place(new, old, out, [*_model_files(out), out / PACKED, *(out / ADAPTER).glob("*")])


def add_packed(model: nn.Module, directory: str | Path, masks: Mapping[str, Tensor]) -> None:
    """Write the packed file of the pruned model in `directory`, loaded as `model`, all of it or nothing."""
    directory = Path(directory)
    check_output(directory, overwrite=True, needed=size(model))
    check_zeros(model, masks)
    with staged(directory) as staging:
        new = staging / "new"
        (new / PACKED).parent.mkdir(parents=True)
        _write_packed(model, masks, new / PACKED)
        flush(new / PACKED)
        _move_into_place(new, staging / "old", directory)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A place in `out` to write into, gone at the end; UserError for what the disk refuses, and `out` is as it was."""
    created = [path for path in (out / "perp", out, *out.absolute().parents) if not path.exists()]
    staging = out / STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)
        yield staging
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{out} could not be written ({error}) and nothing was left there; make room or choose another directory."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for path in created:  # those that hold something stay
            with suppress(OSError):
                path.rmdir()


def load_masks(directory: str | Path) -> dict[str, Tensor]:
    """The masks that `save` wrote: qualified layer name -> bool [N, K], True = kept."""
    path = Path(directory) / MASKS
    if not path.is_file():
        raise UserError(f"{directory} has no {MASKS}; for a model pruned elsewhere take its masks from its zeros.")
    return mask_files.read(path)


def masks_from_zeros(model: nn.Module) -> dict[str, Tensor]:
    """Masks of a model pruned elsewhere: in every linear of its blocks, what is zero counts as pruned.

    A kept weight that happens to be zero is lost to the mask; where perp's own masks exist, use `load_masks`.
    """
    prefix, blocks = find_blocks(model)
    return {
        name: linear.weight.detach() != 0
        for number, block in enumerate(blocks)
        for name, linear in prunable(block, f"{prefix}.{number}").items()
    }


def _is_empty(out: Path) -> bool:
    entries = {entry.name for entry in out.iterdir()}
    if entries == {"perp"}:
        return {entry.name for entry in (out / "perp").iterdir()} <= {STAGING.name, LOCK.name}
    # A save killed while moving its files has moved every one of them but config.json.
    unfinished = (out / STAGING).exists() and not (out / "config.json").exists()
    return not entries or (unfinished and entries <= {"perp", *(file.name for file in _model_files(out))})


def _model_files(out: Path) -> list[Path]:
    return sorted(file for pattern in _MODEL_FILES for file in out.glob(pattern) if file.is_file())


def _check_model(model: nn.Module, masks: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, SparseLinear):
            raise UserError(f"{name} is still a SparseLinear; merge adapters and unswap before saving.")
    check_finite(model, "the model to save")
    check_counts(masks, manifest)
    check_zeros(model, masks)


def check_counts(masks: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    counts = manifests.check(manifest, "the manifest")["sparsity"]
    if set(counts) != set(masks):
        raise UserError("the manifest counts other layers than the masks; build it from the masks that are saved.")
    for name, mask in masks.items():
        if counts[name] != {"pruned": int((~mask).sum()), "total": mask.numel()}:
            raise UserError(f"the manifest counts {name} otherwise than its mask; build it from the masks saved.")


def check_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    modules = dict(model.named_modules())
    fused = {name: linear for name, linear in linears(model).items() if name not in modules}
    for name, mask in masks.items():
        weight = getattr(modules.get(name, fused.get(name)), "weight", None)
        if weight is None or weight.shape != mask.shape:
            raise UserError(f"the mask of {name} fits no layer of this model; save the masks it was pruned with.")
        # Not by indexing, which on a GPU makes an int64 pair for every pruned weight.
        lost = int((weight.detach() != 0).logical_and_(~mask.to(weight.device)).sum())
        if lost:
            raise UserError(f"{lost} pruned weights of {name} are not zero; the model no longer has its masks' zeros.")


def _write_model(model: Any, tokenizer: Any, directory: Path) -> None:
    save_weights(model, directory)
    write_tokenizer(tokenizer, directory)


def write_tokenizer(tokenizer: Any, directory: Path) -> None:
    with quiet():
        try:
            tokenizer.save_pretrained(directory)
        except Exception as error:
            if type(error) is Exception:  # what the tokenizers' own code raises when a write fails
                raise OSError(str(error)) from error
            raise


def _write_packed(model: nn.Module, masks: Mapping[str, Tensor], path: Path) -> None:
    def weight(name: str) -> Tensor:
        return model.get_submodule(name).weight.detach()  # type: ignore[operator]

    # Fused experts stay in the model's own files: load_packed puts a layer where an nn.Linear was.
    names = [name for name, mask in masks.items() if mask.ndim == 2]
    packed_files.write(path, names, weight, lambda name: masks[name].to(weight(name).device))


def _move_into_place(new: Path, old: Path, out: Path, former: Iterable[Path] = ()) -> None:
    """Move the `former` model's files from `out` to `old` and all of `new` to `out`; all moves or none.

    config.json is the first to go and the last to come: no loader sees a mixture of two models.
    """
    moves: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        moves.append((source, target))  # before it happens: an interruption may fall between the two
        source.replace(target)

    incoming = [file.relative_to(new) for file in sorted(new.rglob("*")) if file.is_file()]
    outgoing = {file for file in (*former, *(out / name for name in incoming)) if file.is_file()}
    try:
        for file in sorted(outgoing, key=lambda file: file.name != "config.json"):
            move(file, old / file.relative_to(out))
        for name in sorted(incoming, key=lambda file: file.name == "config.json"):
            move(new / name, out / name)
        for directory in {target.parent for _, target in moves}:
            flush(directory)
    except BaseException:
        for source, target in reversed(moves):
            if not source.exists():
                target.replace(source)
        raise
