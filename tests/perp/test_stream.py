import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from perp import models, shards
from perp.activations import Place
from perp.blocks import find_blocks
from perp.errors import UserError
from perp.finished import Finished
from perp.prune import prune_model
from perp.reconstruct import ReconstructSettings
from perp.residence import Streamed
from perp.stream import Stream

from . import families, tiny

FIT = ReconstructSettings(epochs=1, batch=2)


def sharded(directory: Path, family: str, **changes) -> Path:
    """A model of several shards, cut wherever their size is reached."""
    path = directory / family
    words = tiny.tokenizer()
    dtype = changes.pop("dtype", torch.float32)
    families.build(family, vocab_size=len(words), dtype=dtype, **changes).save_pretrained(path, max_shard_size="20KB")
    words.save_pretrained(path)
    assert len(list(path.glob("model-*.safetensors"))) > 3
    return path


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_an_entered_block_is_the_block_of_the_whole_model_and_leaves_no_data(tmp_path, family):
    directory = sharded(tmp_path, family)
    whole, _ = models.load(str(directory))
    _, blocks = find_blocks(whole)
    stream = Stream(str(directory))
    assert all(weight.is_meta for weight in stream.blocks.parameters())
    for index, block in enumerate(blocks):
        with stream.enter(index), stream.enter(index):
            found = {**dict(stream.blocks[index].named_parameters()), **dict(stream.blocks[index].named_buffers())}
            expected = {**dict(block.named_parameters()), **dict(block.named_buffers())}
            assert list(found) == list(expected)
            for name, tensor in expected.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor), name
            assert not any(module.training for module in stream.blocks[index].modules())
        assert all(weight.is_meta for weight in stream.blocks[index].parameters())
    outside = {name: weight for name, weight in whole.named_parameters() if not name.startswith(stream.prefix)}
    for name, weight in outside.items():
        assert torch.equal(stream.model.get_parameter(name), weight)


@pytest.mark.parametrize("activations", ["memory", "disk"])
@pytest.mark.parametrize(
    "family, dtype, method, pattern, settings",
    [
        ("llama", torch.bfloat16, "wanda", "2:4", FIT),
        ("opt-post-norm", torch.float32, "sparsegpt", "0.5", None),
        ("gemma3", torch.bfloat16, "magnitude", "0.5", FIT),
        ("phi", torch.float32, "wanda", "0.5", FIT),
    ],
)
def test_streaming_prunes_bitwise_as_in_memory(tmp_path, family, dtype, method, pattern, settings, activations):
    directory = sharded(tmp_path, family, dtype=dtype)
    ids = families.windows(3, 12)
    model, _ = models.load(str(directory))
    whole = prune_model(model, ids, method, pattern, settings)
    stream = Stream(str(directory))
    stage = Finished(tmp_path / "stage")
    residence = Streamed(stream, stage, Place(activations, len(ids), tmp_path))
    streamed = prune_model(stream.model, ids, method, pattern, settings, residence=residence)
    assert streamed.losses == whole.losses
    masks = stage.all_masks(len(stream.blocks))
    assert list(masks) == list(whole.masks)
    for name, mask in whole.masks.items():
        assert torch.equal(masks[name], mask)
    with stream.reading(stage.tensors):
        for index, block in enumerate(find_blocks(model)[1]):
            with stream.enter(index):
                for name, weight in block.named_parameters():
                    assert torch.equal(stream.blocks[index].get_parameter(name), weight), name


def test_what_is_damaged_is_refused_before_any_block_is_read(tmp_path):
    directory = sharded(tmp_path, "llama")
    index = directory / models.INDEX
    told = json.loads(index.read_text())
    shard = directory / sorted(set(told["weight_map"].values()))[1]
    key = next(key for key, place in told["weight_map"].items() if place == shard.name)
    index.write_text(json.dumps({**told, "weight_map": {**told["weight_map"], f"{key}_more": shard.name}}))
    with pytest.raises(UserError, match=rf"names {key}_more, which {shard.name} does not hold"):
        Stream(str(directory))
    index.write_text(json.dumps(told))
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    with pytest.raises(UserError, match=rf"{shard.name} is truncated or damaged"):
        Stream(str(directory))
    shard.unlink()
    with pytest.raises(UserError, match=rf"lacks {shard.name}"):
        Stream(str(directory))


def test_a_block_with_a_value_that_is_not_finite_is_refused_as_it_enters(tmp_path):
    directory = sharded(tmp_path, "llama")
    for shard in directory.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name == "model.layers.1.mlp.up_proj.weight":
                tensor[3, 5] = torch.nan
                save_file(tensors, shard, {"format": "pt"})
    stream = Stream(str(directory))
    with stream.enter(0):
        pass
    with pytest.raises(UserError, match=r"mlp\.up_proj\.weight of block 1 .* holds NaN or infinite"), stream.enter(1):
        pass
    assert all(weight.is_meta for weight in stream.blocks.parameters())


def test_hidden_states_in_a_file_are_those_put_there(tmp_path):
    place = Place("disk", 3, tmp_path)
    states, others = place(), place()
    for number in range(3):
        states.append(torch.full((1, 2, 4), number, dtype=torch.bfloat16))
        others.append(torch.full((1, 2, 4), 10 + number, dtype=torch.bfloat16))
    states[1] = torch.full((1, 2, 4), 7, dtype=torch.bfloat16)
    assert [state[0, 1, 3].item() for state in states] == [0, 7, 2]
    assert len(states) == 3
    assert not list(tmp_path.iterdir())
    states[:] = others
    assert [state[0, 0, 0].item() for state in states] == [10, 11, 12]
    with pytest.raises(IndexError):
        states.append(torch.zeros(1, 2, 4))


@pytest.mark.parametrize("family, dtype", [("llama", torch.bfloat16), ("phi", torch.float32)])
def test_reading_ahead_changes_no_bit(tmp_path, family, dtype):
    directory = sharded(tmp_path, family, dtype=dtype)
    ids = families.windows(2, 12)
    found = []
    for ahead in (False, True):
        stream = Stream(str(directory), ahead=ahead)
        stage = Finished(tmp_path / str(ahead))
        pruned = prune_model(stream.model, ids, "wanda", "2:4", FIT, residence=Streamed(stream, stage))
        found.append((pruned.losses, [stage.weights(index).read_bytes() for index in range(len(stream.blocks))]))
    assert found[0] == found[1]


def reading_ahead() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "perp-ahead"]


def test_the_next_block_is_read_once_and_nothing_after_the_last(tmp_path, monkeypatch):
    stream = Stream(str(sharded(tmp_path, "llama")), ahead=True)
    read: list[set[int]] = []
    through = shards.read_through
    monkeypatch.setattr(
        shards, "read_through", lambda places: read.append(set(map(shards.number, places))) or through(places)
    )
    with stream.enter(0), stream.enter(0):
        assert len(reading_ahead()) <= 1
    with stream.enter(1):
        assert not reading_ahead()
    assert read == [{1}]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_shard_that_is_cut_meanwhile_is_one_sentence(tmp_path, monkeypatch, ahead):
    directory = sharded(tmp_path, "llama")
    stream = Stream(str(directory), ahead=ahead)
    (shard,) = stream.shards.slices(stream._own[1][-1:]).places.values()

    def cut(*_) -> None:
        os.truncate(shard, shard.stat().st_size - 1)

    if ahead:  # by the time that the thread reads it
        through = shards.read_through
        monkeypatch.setattr(shards, "read_through", lambda places: (cut(), through(places)))
    with stream.enter(0):
        if not ahead:
            cut()
    with (
        pytest.raises(UserError, match=r"model-.*safetensors is truncated or damaged \(.*\); copy it again\.$"),
        stream.enter(1),
    ):
        pass
    assert not reading_ahead()


def test_the_thread_that_reads_ahead_ends_with_a_failure(tmp_path):
    stream = Stream(str(sharded(tmp_path, "llama")), ahead=True)
    with pytest.raises(KeyboardInterrupt), stream.enter(0):
        raise KeyboardInterrupt
    assert not reading_ahead()
    assert all(weight.is_meta for weight in stream.blocks.parameters())
    with stream.enter(1):
        assert not any(weight.is_meta for weight in stream.blocks[1].parameters())
