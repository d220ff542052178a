"""The defaults that docs/methods.md states are those of the code."""

from __future__ import annotations

import importlib
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from perp.parts import RETRAIN_RATES, UNIT_RATES

DOCUMENT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
DEFAULTS = re.findall(r"^\| `(perp\..+)` \| (.+) \|$", DOCUMENT, re.MULTILINE)
RATES = re.findall(r"^\| `(\w+)` \| (\S*) \| (\S*) \|$", DOCUMENT, re.MULTILINE)


def value(expression: str) -> Any:
    """What `perp.module.rest` is; the module is as much of it as can be imported."""
    names = re.match(r"[\w.]+", expression)[0].split(".")
    for count in range(len(names), 1, -1):
        try:
            module = importlib.import_module(".".join(names[:count]))
        except ModuleNotFoundError:
            continue
        return eval(f"module.{expression[len(module.__name__) + 1 :]}", {"module": module})
    raise AssertionError(expression)


def test_the_tables_were_found() -> None:
    assert len(DEFAULTS) > 30


@pytest.mark.parametrize("expression, told", DEFAULTS)
def test_a_default_is_what_the_document_says(expression: str, told: str) -> None:
    found = value(expression)
    if isinstance(found, int | float | Fraction):
        assert float(found) == float(told)
    else:
        assert (found if isinstance(found, str) else ", ".join(found)) == told


def test_rates_are_what_the_document_says() -> None:
    for column, rates in ((1, RETRAIN_RATES), (2, UNIT_RATES)):
        assert [(row[0], float(row[column])) for row in RATES if row[column]] == list(rates.items())
