from __future__ import annotations

import subprocess
import sys

import pytest

import perp

from . import tiny


def test_every_public_name_is_there():
    for name in perp.__all__:
        assert getattr(perp, name) is not None
    assert set(perp.__all__) <= set(dir(perp))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = perp.nothing


def test_importing_the_package_imports_nothing_heavy():
    path = [entry for entry in sys.path if entry]
    code = f"import sys; sys.path[:0] = {path}; import perp; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prune_retrain_merge_and_save_through_the_public_names(tmp_path):
    model, tokenizer = perp.load(str(tiny.model_dir(tmp_path)))
    parts = perp.split(perp.documents(tiny.text_file(tmp_path)))
    windows = perp.training_windows(tokenizer, parts.train, seqlen=16, enough=4)
    pruned = perp.prune_model(model, perp.sample(windows, 2, seed=0), "wanda", "2:4")
    held_out = perp.windows(tokenizer, parts.test, seqlen=16, count=2)
    before = perp.perplexity(model, held_out)
    perp.swap_linears(model, pruned.masks)
    perp.retrain_model(model, windows, perp.RetrainSettings(parts=("mask_lora", "norms"), steps=8, batch=2))
    perp.merge(model)
    perp.unswap(model)
    assert perp.perplexity(model, held_out) < before
    for name, mask in pruned.masks.items():
        assert (model.get_submodule(name).weight[~mask] == 0).all()
