"""The text of a job: what is trained on, what is judged on, and what identifies both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perp import data
from perp.errors import UserError


@dataclass(frozen=True)
class Texts:
    """`held_out`: by the name under which it is judged. `identity`: as the manifest tells it."""

    train: list[str]
    held_out: dict[str, list[str]]
    identity: dict[str, Any]


def read(name: str, further: Sequence[str] = ()) -> Texts:
    """The parts of the text `name` to train and to judge on, and the `further` texts to judge on, whole."""
    source = data.documents(name)
    parts = data.split(source)
    held_out = {source.label: parts.test}
    identity: dict[str, Any] = {"train": {**source.identity, "split_by": parts.by}, "evaluate": []}
    for other in map(data.documents, further):
        if other.identity["sha256"] == source.identity["sha256"]:
            raise UserError(
                f"{other.name} is the text trained on, whose test part is judged anyway; give another text."
            )
        held_out[other.name if other.label in held_out else other.label] = other.texts
        identity["evaluate"].append(other.identity)
    return Texts(parts.train, held_out, identity)
