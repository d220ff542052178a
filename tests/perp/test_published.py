"""The documented way to a published figure (docs/methods.md), on a tiny OPT and data sets of the form of those on the
hub: what a run that can reach it would read, from the cache that the library keeps of data sets."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import perp
from perp import report
from perp.data import SEPARATOR, documents

from . import tiny

datasets = pytest.importorskip("datasets")

C4, WIKITEXT = "allenai/c4/en", "Salesforce/wikitext/wikitext-2-raw-v1:test"
# A data set of lines: most are blank, and headings and paragraphs end in a line break of their own.
LINES = ["", " = Article = \n", "", *(line for n in range(40) for line in (tiny.article(n) + " \n", ""))]


def put(cache: Path, repo: str, config: str, split: str, texts: list[str]) -> None:
    """A data set as the library caches it."""
    from datasets.arrow_writer import ArrowWriter

    owner, name = repo.split("/")
    folder = cache / f"{owner}___{name}" / config / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    features = datasets.Features({"text": datasets.Value("string")})
    writer = ArrowWriter(path=str(folder / f"{name}-{split}.arrow"), features=features)
    for text in texts:
        writer.write({"text": text})
    rows, size = writer.finalize()
    splits = datasets.SplitDict(dataset_name=name)
    splits.add(datasets.SplitInfo(split, num_examples=rows, num_bytes=size))
    datasets.DatasetInfo(
        features=features, splits=splits, dataset_name=name, config_name=config, version="0.0.0"
    ).write_to_directory(str(folder))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "allenai/c4", "en", "train", [tiny.article(n, sentences=1 + n % 12) for n in range(60)])
    put(tmp_path, "Salesforce/wikitext", "wikitext-2-raw-v1", "test", LINES)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_sparsegpt_of_opt_by_the_names_of_the_hub(hub: None, tmp_path: Path) -> None:
    assert documents(WIKITEXT).texts == LINES
    found = perp.run_job(
        perp.RunSettings(
            model=str(tiny.model_dir(tmp_path, "opt")),
            out=tmp_path / "out",
            method="sparsegpt",
            pattern="0.5",
            reconstruct="none",
            retrain=(),
            data=C4,
            calibration="documents",
            windows=8,
            seqlen=32,
            eval_data=(WIKITEXT,),
            eval_windows=1000,
        )
    )
    dense, pruned = found.rows
    assert (dense.stage, pruned.stage) == (report.DENSE, report.PRUNED)
    assert pruned.zeros == pytest.approx(0.5, abs=0.01)
    for row, name in ((dense, tmp_path / "opt"), (pruned, tmp_path / "out")):
        model, tokenizer = perp.load(str(name))
        assert row.perplexity[documents(WIKITEXT).label] == pytest.approx(published(model, tokenizer, LINES), rel=1e-5)


@torch.no_grad()
def published(model: torch.nn.Module, tokenizer: object, rows: list[str], seqlen: int = 32) -> float:
    """As the papers' codes have it: the rows joined by two line breaks, the mean loss of each window of the whole."""
    ids = torch.tensor(tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"])
    losses = []
    for start in range(0, len(ids) // seqlen * seqlen, seqlen):
        window = ids[None, start : start + seqlen]
        logits = model(window).logits[0, :-1].double()
        losses.append(F.cross_entropy(logits, window[0, 1:]).item())
    return math.exp(sum(losses) / len(losses))


def test_blank_rows_count_where_a_text_is_judged_whole_and_nowhere_else(hub: None) -> None:
    source = documents(WIKITEXT)
    parts = perp.split(source)
    assert all(text.strip() for text in parts.part("all"))
    assert len(parts.part("all")) == 41
    assert SEPARATOR.join(source.texts) != SEPARATOR.join(text for text in source.texts if text.strip())
