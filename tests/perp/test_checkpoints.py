import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from perp import checkpoints, manifest, models
from perp.blocks import find_blocks, prunable
from perp.errors import UserError
from perp.linear import swap_linears

from . import families, tiny

ROOT = Path(__file__).parents[2]


def pruned(family: str = "llama") -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with half of each prunable weight zero, and one kept weight of each that happens to be zero."""
    model = families.build(family, vocab_size=len(tiny.tokenizer()))
    return model, prune(model)


def prune(model: Any) -> dict[str, torch.Tensor]:
    prefix, blocks = find_blocks(model)
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for number, block in enumerate(blocks):
        for name, linear in prunable(block, f"{prefix}.{number}").items():
            mask = torch.rand(linear.weight.shape, generator=generator) < 0.5
            with torch.no_grad():
                linear.weight.masked_fill_(~mask, 0)
                linear.weight.view(-1)[mask.view(-1).nonzero()[0]] = 0
            masks[name] = mask
    return masks


def manifest_of(masks: dict[str, torch.Tensor]) -> dict[str, Any]:
    return manifest.build(method="magnitude", pattern="0.5", masks=masks, data={}, seeds={})


def save(
    out: Path, family: str = "llama", tokenizer: Any = None, **options: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    model, masks = pruned(family)
    checkpoints.save(model, tokenizer or tiny.tokenizer(), out, masks, manifest_of(masks), **options)
    return model, masks


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Breaking:
    """A tokenizer whose saving, after the weights are staged, fails as a real one may."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_pretrained(self, directory: Path) -> None:
        Path(directory, "tokenizer.json").write_text("half of i")
        raise self.error


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_plain_loading_gives_every_tensor_bitwise(tmp_path: Path, family: str) -> None:
    model, masks = save(tmp_path / "out", family)
    again, tokenizer = models.load(str(tmp_path / "out"))
    expected = model.state_dict()
    found = again.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert tokenizer("under old bridges").input_ids == tiny.tokenizer()("under old bridges").input_ids
    for name, mask in checkpoints.load_masks(tmp_path / "out").items():
        assert torch.equal(mask, masks[name])
        assert not again.get_submodule(name).weight[~mask].any()
    assert set(checkpoints.load_masks(tmp_path / "out")) == set(masks)


def test_a_process_without_perp_computes_the_same(tmp_path: Path) -> None:
    text = "seven hills and rain"
    script = """
import sys
sys.modules["perp"] = sys.modules["perp_kernels"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
text, threads, *directories = sys.argv[1:]
torch.set_num_threads(int(threads))
for directory in directories:
    ids = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()(ids).logits
    save_file({"ids": ids, "logits": logits}, directory + ".logits")
"""
    expected = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, tokenizer = models.load(str(tiny.model_dir(tmp_path)), dtype=dtype)
        masks = prune(model)
        out = tmp_path / str(dtype)
        checkpoints.save(model, tokenizer, out, masks, manifest_of(masks))
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected[out] = ids, model(ids).logits
    arguments = [text, str(torch.get_num_threads()), *map(str, expected)]
    subprocess.run([sys.executable, "-I", "-c", script, *arguments], check=True, cwd=tmp_path, capture_output=True)
    for out, (ids, logits) in expected.items():
        found = load_file(f"{out}.logits")
        assert torch.equal(found["ids"], ids)
        assert torch.equal(found["logits"], logits)
        assert found["logits"].dtype == logits.dtype


def test_files_and_their_form(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    _, masks = save(out)
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "perp.json"}
    assert [path.name for path in (out / "perp").iterdir()] == ["masks.safetensors"]
    assert not list(out.rglob("*.bin"))
    assert manifest.read(out) == manifest_of(masks)
    with safe_open(out / "perp" / "masks.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["perp-masks"])
        assert about["version"] == 1
        columns = about["columns"]
        assert set(file.keys()) == set(columns) == {f"{name}.weight" for name in masks}
        for name, mask in masks.items():
            bits = file.get_tensor(f"{name}.weight")
            assert bits.dtype == torch.uint8
            assert bits.shape == (mask.shape[0], -(-mask.shape[1] // 8))
            row, column = 3, 11
            assert bool(bits[row, column // 8] >> (column % 8) & 1) == bool(mask[row, column])


def test_every_file_is_readable_by_those_whom_the_umask_lets(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    save(tmp_path / "out")
    modes = {path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {ordinary.stat().st_mode}


def test_odd_widths_and_empty_rows_round_trip(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(13, 5)

        def save_pretrained(self, directory: Path) -> None:
            save_file(self.state_dict(), Path(directory, "model.safetensors"))

    model = Odd()
    mask = torch.rand(5, 13) < 0.5
    mask[2] = False
    with torch.no_grad():
        model.layer.weight.masked_fill_(~mask, 0)
    checkpoints.save(model, tiny.tokenizer(), tmp_path / "out", {"layer": mask}, manifest_of({"layer": mask}))
    assert torch.equal(checkpoints.load_masks(tmp_path / "out")["layer"], mask)


def test_masks_from_zeros_loses_kept_zeros_only() -> None:
    model, masks = pruned()
    found = checkpoints.masks_from_zeros(model)
    assert set(found) == set(masks)
    for name, mask in masks.items():
        assert not (found[name] & ~mask).any()
        assert int((mask & ~found[name]).sum()) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error"), RuntimeError("no")], ids=repr)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_things_as_they_were(tmp_path: Path, error: BaseException, existing: bool) -> None:
    out = tmp_path / "new" / "out"
    if existing:
        save(out, "opt")
        (out / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        save(out, tokenizer=Breaking(error), overwrite=existing)
    assert snapshot(tmp_path) == before
    assert (tmp_path / "new").exists() == existing
    assert not (out / "perp" / "staging").exists()


def test_a_failure_while_moving_puts_the_old_model_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(out, "opt")
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").mkdir()
    before = snapshot(out)
    with pytest.raises(UserError, match="could not be written"):
        save(out, overwrite=True)
    assert snapshot(out) == before


def test_overwrite_replaces_the_model_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model, masks = pruned("opt")
    checkpoints.save(model, tiny.tokenizer(), out, masks, manifest_of(masks))
    (out / "model-00001-of-00002.safetensors").write_bytes(b"of another model")
    (out / "model.safetensors.index.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    (out / "results").mkdir()
    (out / "results" / "config.json").write_text("mine")
    with pytest.raises(UserError, match="not empty; choose another output directory or pass --overwrite"):
        save(out)
    save(out, overwrite=True)
    fresh = tmp_path / "fresh"
    save(fresh)
    mine = {"notes.txt": b"mine", str(Path("results", "config.json")): b"mine"}
    assert snapshot(out) == snapshot(fresh) | mine


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk(tmp_path: Path, existing: bool) -> None:
    """A file size limit is how the system itself makes a write fail half way without a second disk."""
    out = tmp_path / "out"
    if existing:
        save(out, "opt")
    before = snapshot(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"could not be written .*nothing was left there"):
            save(out, overwrite=existing)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot(tmp_path) == before
    assert out.exists() == existing
    save(out, overwrite=existing)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for the weights, by a page or two, and for nothing beside them."""
    path = tmp_path / "disk"
    path.mkdir()
    room = checkpoints.size(pruned()[0]) + 16_384
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "perp", path], capture_output=True).returncode:
        pytest.skip("mounting needs privileges")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    with pytest.raises(UserError, match=r"could not be written .*No space left.*nothing was left there"):
        save(small_disk / "out")
    assert not list(small_disk.iterdir())
    (small_disk / "mine").write_bytes(bytes(40_000))
    with pytest.raises(UserError, match=r"out needs .* GB but its disk has .* GB free; make room"):
        save(small_disk / "out")


def test_kill_9_leaves_a_directory_that_counts_as_empty(tmp_path: Path) -> None:
    """Killed while staging, and killed with half of the files moved."""
    script = """
import os, signal, sys
from pathlib import Path
from tests.perp.test_checkpoints import save
staging, moving = map(Path, sys.argv[1:])
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if os.fork() == 0:
    class Dying:
        save_pretrained = die
    save(staging, tokenizer=Dying())
os.wait()
replace = Path.replace
Path.replace = lambda source, target: die() if target.name == "tokenizer.json" else replace(source, target)
save(moving)
"""
    outs = [tmp_path / "staging", tmp_path / "moving"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    command = [sys.executable, "-c", script, *map(str, outs)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    save(tmp_path / "fresh")
    for out in outs:
        assert (out / "perp" / "staging").exists()
        assert not (out / "config.json").exists()
        assert (out / "model.safetensors").exists() == (out.name == "moving")
        checkpoints.check_output(out)
        save(out)
        assert snapshot(out) == snapshot(tmp_path / "fresh")
        with pytest.raises(UserError, match="not empty"):
            checkpoints.check_output(out)


def test_check_output(tmp_path: Path) -> None:
    checkpoints.check_output(tmp_path)
    checkpoints.check_output(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="is a file; choose another"):
                checkpoints.check_output(path, overwrite)
    with pytest.raises(UserError, match="not empty"):
        checkpoints.check_output(tmp_path)
    checkpoints.check_output(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="cannot be written"):
        checkpoints.check_output("/proc/out")
    (tmp_path / "perp").mkdir()
    (tmp_path / "perp" / "staging").mkdir()
    with pytest.raises(UserError, match="not empty"):
        checkpoints.check_output(tmp_path)


def test_a_directory_without_permission(tmp_path: Path) -> None:
    out = tmp_path / "locked"
    out.mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:
        for path in (tmp_path, *tmp_path.parents):
            if not path.stat().st_mode & 0o001:
                path.chmod(path.stat().st_mode | 0o011)
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"locked cannot be written \(Permission denied\)"):
            checkpoints.check_output(out)
    finally:
        os.seteuid(user)


def test_what_must_not_be_saved(tmp_path: Path) -> None:
    model, masks = pruned()
    content = manifest_of(masks)
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight.data
    row, column = (~masks[name]).nonzero()[0].tolist()

    def refused(message: str, masks: dict[str, torch.Tensor], content: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=message):
            checkpoints.save(model, tiny.tokenizer(), tmp_path / "out", masks, content)
        assert not (tmp_path / "out").exists()

    weight[row, column] = 1e-30
    refused(f"1 pruned weights of {name} are not zero", masks, content)
    weight[row, column] = float("nan")
    refused("NaN or infinite", masks, content)
    weight[row, column] = 0
    other = {**masks, name: masks[name].clone()}
    other[name][row, column] = True
    refused(f"the manifest counts {name} otherwise", other, content)
    refused("other layers than the masks", {name: masks[name]}, content)
    refused("fits no layer", {"nowhere": masks[name]}, manifest_of({"nowhere": masks[name]}))
    refused("fits no layer", {name: masks[name].T}, manifest_of({name: masks[name].T}))
    refused("method is missing", masks, {key: value for key, value in content.items() if key != "method"})
    swap_linears(model, masks)
    refused("still a SparseLinear; merge adapters and unswap", masks, content)


@pytest.mark.parametrize("damage", ["absent", "truncated", "foreign", "narrow"])
def test_load_masks_refuses(tmp_path: Path, damage: str) -> None:
    save(tmp_path)
    path = tmp_path / "perp" / "masks.safetensors"
    if damage == "absent":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "foreign":
        save_file({"layer.weight": torch.zeros(2, 2, dtype=torch.uint8)}, path)
    else:
        metadata = {"perp-masks": '{"version": 1, "columns": {"layer.weight": 17}}'}
        save_file({"layer.weight": torch.zeros(2, 2, dtype=torch.uint8)}, path, metadata=metadata)
    message = {"absent": "has no perp/masks", "foreign": "not a mask file of version 1"}.get(
        damage, "truncated or damaged"
    )
    with pytest.raises(UserError, match=message):
        checkpoints.load_masks(tmp_path)


def test_sampling_parameters_without_sampling_still_save(tmp_path: Path) -> None:
    model, masks = pruned()
    model.generation_config.temperature = 0.6
    checkpoints.save(model, tiny.tokenizer(), tmp_path / "out", masks, manifest_of(masks))
    again, _ = models.load(str(tmp_path / "out"))
    assert again.generation_config.temperature == 0.6


def test_saving_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "out")
    assert capfd.readouterr() == ("", "")
