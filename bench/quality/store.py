"""Finished rows on disk: what a resumed run finds again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.quality.rows import ROWS
from bench.results import write_json


class Store:
    """The rows of one results file by name; the file is replaced after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._rows = {row["row"]: row for row in json.loads(path.read_text())["rows"]}

    def has(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Whether the row was measured under exactly these settings."""
        return name in self._rows and self._rows[name]["settings"] == settings

    def put(self, row: dict[str, Any]) -> None:
        self._rows[row["row"]] = row
        write_json(self.path, {"rows": self.rows()})

    def rows(self) -> list[dict[str, Any]]:
        """In the order of the registry; a row at another rate stands after the one it varies."""
        order = {name: index for index, name in enumerate(ROWS)}
        return sorted(
            self._rows.values(), key=lambda row: (order.get(row["row"].partition("@")[0], len(order)), row["row"])
        )
