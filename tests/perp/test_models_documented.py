"""What docs/models.md says of families, their cuts and what is refused is what the code does."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from perp.experts import opened
from perp.units import Unit, units

from .families import FAMILIES, MIXTURES, build
from .test_families import test_of_a_model_that_sees_only_the_language_part_changes as sees
from .test_families import test_the_whole_run as whole_run

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "models.md").read_text()
ROWS = re.findall(r"^\| (\S+) \| (\w+) \| .+ \| (\w+) \| `(.+)` \|$", DOCUMENT, re.MULTILINE)
TOLD = re.findall(r"^\| .+ \| `(… .+)` \|$", DOCUMENT, re.MULTILINE)
KNOWN = {**FAMILIES, **MIXTURES}


def test_the_families_are_those_that_are_run() -> None:
    assert [family for family, *_ in ROWS] == list(KNOWN)
    (mark,) = (mark for mark in whole_run.pytestmark if mark.name == "parametrize")
    assert mark.args == ("family", list(KNOWN))


def cut(parts: list[Unit]) -> str:
    if len(parts) == 1:
        return "whole"
    return "halves" if parts[1].follows else "branches"


@pytest.mark.parametrize("family, kind, told, test", ROWS, ids=[family for family, *_ in ROWS])
def test_a_family_is_what_the_document_says(family: str, kind: str, told: str, test: str) -> None:
    assert KNOWN[family]()[0].__name__ == kind
    model = build(family)
    with warnings.catch_warnings(), opened(model):
        warnings.simplefilter("ignore")
        assert {cut(parts) for _, parts in units(model)} == {told}
    assert test == f"tests/perp/test_families.py::{whole_run.__name__}[{family}]"


def test_what_is_told_is_in_the_code() -> None:
    source = "".join(path.read_text() for path in (ROOT / "python" / "perp").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    assert len(TOLD) >= 14
    for sentence in TOLD:
        for part in sentence.split("…"):
            assert part.strip() in source, sentence
    assert f"`tests/perp/test_families.py::{sees.__name__}`" in DOCUMENT
