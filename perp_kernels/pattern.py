"""Pattern: how many weights are pruned, and among which weights the choice is made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, cast, get_args

Scope = Literal["row", "matrix", "slab"]

_SHARE = re.compile(r"\d*\.?\d+|\d+\.")
_N_OF_M = re.compile(r"(\d+):(\d+)")


class PatternError(ValueError):
    """A pattern that does not parse, or that a weight's shape cannot follow."""


@dataclass(frozen=True)
class Pattern:
    """A share of zeros, or N kept of every M consecutive inputs of an output row.

    `sparsity` is the exact share pruned, strictly between 0 and 1. A share is chosen within a `scope`: each output
    row, the whole matrix, or each slab of 128 columns over all rows; None leaves the choice to the method. An N:M
    pattern has `n` and `m` set and no scope.
    """

    n: int | None
    m: int | None
    sparsity: Fraction
    scope: Scope | None = None

    def __post_init__(self) -> None:
        # As text a share is a decimal fraction, and the ops take it as text. Over d it has less than log2(d) decimals.
        d = self.sparsity.denominator
        if not self.is_nm and 10 ** d.bit_length() % d:
            raise PatternError(f"A share of zeros is a decimal fraction such as 3/5, not {self.sparsity}.")

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Read "0.6", "0.6/row", "0.6/matrix", "0.6/slab" or "2:4"; a Pattern is returned as it is."""
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            raise PatternError(f'A pattern is text such as "0.6" or "2:4", not {type(text).__name__} {text!r}.')
        body, slash, scope = text.strip().partition("/")
        if slash and scope not in get_args(Scope):
            raise PatternError(f'Pattern "{text}" names the scope "{scope}"; a scope is row, matrix or slab.')
        if ":" in body:
            return cls._parse_n_of_m(text, body, bool(slash))
        return cls._parse_share(text, body, cast(Scope, scope) if slash else None)

    @classmethod
    def _parse_n_of_m(cls, text: str, body: str, scoped: bool) -> Pattern:
        match = _N_OF_M.fullmatch(body)
        if match is None:
            raise PatternError(f'Pattern "{text}" is not N:M: write two whole numbers, such as "2:4".')
        n, m = int(match[1]), int(match[2])
        if n == 0:
            raise PatternError(f'Pattern "{text}" keeps nothing: N is at least 1, such as "2:4".')
        if n == m:
            raise PatternError(f'Pattern "{text}" prunes nothing: N is less than M, such as "2:4".')
        if n > m:
            raise PatternError(f'Pattern "{text}" keeps {n} of every {m}: N is less than M, such as "2:4".')
        if scoped:
            raise PatternError(f'Pattern "{text}" gives a scope to N:M, which takes none: write "{body}".')
        return cls(n, m, Fraction(m - n, m))

    @classmethod
    def _parse_share(cls, text: str, body: str, scope: Scope | None) -> Pattern:
        if not body:
            raise PatternError('The pattern is empty: write a share of zeros such as "0.6", or N:M such as "2:4".')
        if body.startswith("-"):
            raise PatternError(f'Pattern "{text}" is negative: a share of zeros lies between 0 and 1, such as "0.6".')
        if _SHARE.fullmatch(body) is None:
            raise PatternError(
                f'"{text}" is not a pattern: write a share of zeros such as "0.6", or N:M such as "2:4".'
            )
        share = Fraction(body)
        if share == 0:
            raise PatternError(f'Pattern "{text}" prunes nothing: a share of zeros is above 0, such as "0.6".')
        if share == 1:
            raise PatternError(f'Pattern "{text}" keeps nothing: a share of zeros is below 1, such as "0.6".')
        if share > 1:
            raise PatternError(f'Pattern "{text}" is above 1: a share of zeros lies between 0 and 1, such as "0.6".')
        return cls(None, None, share, scope)

    @property
    def is_nm(self) -> bool:
        return self.m is not None

    def with_scope(self, default: Scope) -> Pattern:
        """This pattern with `default` where a share names no scope; N:M has none to fill."""
        if self.is_nm or self.scope is not None:
            return self
        return Pattern(None, None, self.sparsity, default)

    def pruned(self, count: int) -> int:
        """Weights pruned among `count`: floor(sparsity * count), in exact arithmetic."""
        return count * self.sparsity.numerator // self.sparsity.denominator

    def check(self, K: int, name: str = "weight") -> None:
        """Raise PatternError where rows of K inputs cannot be cut into groups of M; `name` is the layer's."""
        if self.m is not None and K % self.m:
            raise PatternError(
                f'{name} has {K} inputs, which pattern "{self}" cannot divide: choose an M that divides {K}.'
            )

    def __str__(self) -> str:
        if self.is_nm:
            return f"{self.n}:{self.m}"
        numerator, denominator = self.sparsity.as_integer_ratio()
        decimals = next(k for k in range(denominator.bit_length()) if 10**k % denominator == 0)
        share = f"0.{numerator * 10**decimals // denominator:0{decimals}}"
        return share if self.scope is None else f"{share}/{self.scope}"
