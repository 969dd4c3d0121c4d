"""Names in recipes, and the characters that nobody sees."""

import sys
import unicodedata

import pytest

from shopr1_rewards.names import name_flaw, recipe_name_flaw


@pytest.mark.parametrize(
    "name",
    ["click", "add to cart", "x.y:z", "Größe", "价格", "नाम", "ราคา", "שם", "e\u0301", "★", "🎁", "a" * 1000],
)
def test_names(name: str) -> None:
    assert name_flaw(name) is None


@pytest.mark.parametrize(
    ("name", "flaw"),
    [
        ("", "must not be blank"),
        (" \t\u3000", "must not be blank"),
        ("cl\u200bick", "has the invisible character U+200B (ZERO WIDTH SPACE)"),
        ("\ufeffclick", "has the invisible character U+FEFF (ZERO WIDTH NO-BREAK SPACE)"),
        ("click\u200d", "has the invisible character U+200D (ZERO WIDTH JOINER)"),
        ("cl\u2062ick", "has the invisible character U+2062 (INVISIBLE TIMES)"),
        ("cl\u202eick", "has the invisible character U+202E (RIGHT-TO-LEFT OVERRIDE)"),
        ("cl\u00adick", "has the invisible character U+00AD (SOFT HYPHEN)"),
        ("click\ufe0f", "has the invisible character U+FE0F (VARIATION SELECTOR-16)"),
        ("cl\u034fick", "has the invisible character U+034F (COMBINING GRAPHEME JOINER)"),
        ("\u3164", "has the invisible character U+3164 (HANGUL FILLER)"),
        ("\u2800", "has the invisible character U+2800 (BRAILLE PATTERN BLANK)"),
        ("click\U000e0041", "has the invisible character U+E0041 (TAG LATIN CAPITAL LETTER A)"),
        ("cl\nick", "has the invisible character U+000A"),
        ("cl\x00ick", "has the invisible character U+0000"),
        ("cl\x7fick", "has the invisible character U+007F"),
        ("cl\u2028ick", "has the invisible character U+2028 (LINE SEPARATOR)"),
        ("cl\ud83dick", "has the invisible character U+D83D"),
        ("cl\ue000ick", "has the invisible character U+E000"),
        ("cl\uffffick", "has the invisible character U+FFFF"),
        (" click", "must not begin or end with a space"),
        ("click\u00a0", "must not begin or end with a space"),
    ],
    ids=ascii,
)
def test_names_that_no_answer_would_have(name: str, flaw: str) -> None:
    assert name_flaw(name) == flaw


def test_every_format_character_is_refused_and_no_letter_with_ink() -> None:
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        flaw = name_flaw(f"a{character}b")
        if unicodedata.category(character) in ("Cf", "Cc", "Zl", "Zp", "Cs"):
            assert flaw is not None
        elif unicodedata.category(character) in ("Lu", "Ll", "Lt", "Lm", "Nd", "Nl", "No", "Pc", "Pd", "Sc"):
            assert flaw is None


@pytest.mark.parametrize("name", ["", "two words", "line\n", "-a", ".a", "a\u200b", "é"])
def test_recipe_names_that_are_none(name: str) -> None:
    assert recipe_name_flaw(name) == "must be of A-Z a-z 0-9 . _ - and begin with a letter or a digit"
    assert recipe_name_flaw("shop_r1-v2.0") is None
