"""Linears that are left dense though they stand in the blocks: named by patterns, found by name."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from transformers import PreTrainedModel

from perp.blocks import all_prunable
from perp.errors import UserError
from perp_kernels import Pattern, PatternError


def find(model: PreTrainedModel, pattern: Pattern, skip: Collection[str] = ()) -> frozenset[str]:
    """The qualified names of the linears that `skip` names; all others can be pruned to `pattern`.

    skip: shell patterns (`*`, `?`, `[...]`) of a qualified name or of the end of one that begins behind a dot:
    "down_proj", "layers.0.*". UserError for one that names nothing, and where nothing is left to prune; PatternError
    naming the first layer whose inputs an N:M does not divide.
    """
    linears = all_prunable(model)
    found: set[str] = set()
    for one in skip:
        named = {name for name in linears if any(fnmatchcase(end, one) for end in _ends(name))}
        if not named:
            raise UserError(
                f"no linear of the blocks is called {one!r}, which should be skipped; they are called, for example, "
                f"{next(iter(linears))}."
            )
        found |= named
    if found and len(found) == len(linears):
        raise UserError("every linear of the blocks is skipped; leave one to prune.")
    for name, linear in linears.items():
        if name not in found:
            try:
                pattern.check(linear.in_features, name)
            except PatternError as error:
                own = name.rpartition(".")[2]
                raise PatternError(
                    f"{str(error).removesuffix('.')}, or leave such layers dense with --skip {own}."
                ) from error
    return frozenset(found)


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
