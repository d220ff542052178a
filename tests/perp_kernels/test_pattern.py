from fractions import Fraction

import pytest

from perp_kernels import Pattern, PatternError


@pytest.mark.parametrize(
    "text", ["0.6", "0.6/row", "0.6/matrix", "0.6/slab", "2:4", "1:16", "0.123456789012345678901234567"]
)
def test_text_survives_the_round_trip(text: str) -> None:
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    assert Pattern.parse(str(pattern)) == pattern
    assert Pattern.parse(pattern) is pattern


def test_shares_are_exact_decimals() -> None:
    assert Pattern.parse("0.6").sparsity == Fraction(3, 5)
    assert Pattern.parse(" .50 ") == Pattern.parse("0.5")
    # 0.7 * 10 is 7 in decimals and 6.999... in binary floating point.
    assert Pattern.parse("0.7").pruned(10) == 7
    assert Pattern.parse("0.29").pruned(100) == 29
    assert [Pattern.parse("0.6").pruned(count) for count in (0, 1, 2, 4, 5)] == [0, 0, 1, 2, 3]
    assert Pattern.parse("1:4").sparsity == Fraction(3, 4)


@pytest.mark.parametrize("text", ["0.01", "0.00000003", "0.9999999999999999999999999999999999"])
def test_small_and_long_shares_round_trip(text: str) -> None:
    assert str(Pattern.parse(text)) == text


def test_scope_fills_only_where_missing() -> None:
    assert Pattern.parse("0.6").with_scope("row") == Pattern.parse("0.6/row")
    assert Pattern.parse("0.6/slab").with_scope("row") == Pattern.parse("0.6/slab")
    assert Pattern.parse("2:4").with_scope("row") == Pattern.parse("2:4")


BAD = {
    "3:2": "keeps 3 of every 2",
    "0:4": "keeps nothing",
    "4:4": "prunes nothing",
    "2:4:8": "two whole numbers",
    "2:": "two whole numbers",
    "2:4/row": 'write "2:4"',
    "0.6/column": "row, matrix or slab",
    "0.6/": "row, matrix or slab",
    "1.5": "above 1",
    "1": "keeps nothing",
    "0": "prunes nothing",
    "0.0": "prunes nothing",
    "-1": "negative",
    "nan": "not a pattern",
    "abc": "not a pattern",
    "60%": "not a pattern",
    "1e-2": "not a pattern",
    "": "empty",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_text_is_one_sentence(text: str) -> None:
    with pytest.raises(PatternError, match=BAD[text]) as error:
        Pattern.parse(text)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_other_types_are_refused() -> None:
    with pytest.raises(PatternError, match="not float"):
        Pattern.parse(0.6)  # type: ignore[arg-type]


def test_a_share_that_text_cannot_say_is_refused() -> None:
    assert str(Pattern(None, None, Fraction(1, 2**20))) == "0.00000095367431640625"
    with pytest.raises(PatternError, match="not 1/3"):
        Pattern(None, None, Fraction(1, 3))


def test_check_names_the_layer_and_both_numbers() -> None:
    Pattern.parse("2:4").check(8)
    Pattern.parse("0.5").check(7)
    with pytest.raises(PatternError, match=r'blocks\.3\.up has 10 inputs, which pattern "2:4" cannot divide'):
        Pattern.parse("2:4").check(10, "blocks.3.up")
