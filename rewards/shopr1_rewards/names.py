"""Names in recipes: of the recipe, of action types, of attributes.

A policy's answer has such a name or it has not. One with an invisible character looks right in every editor,
and no answer would ever have it.
"""

import re
import unicodedata

RECIPE_NAME = "[A-Za-z0-9][A-Za-z0-9._-]*"
"""Pattern of a recipe's name."""

# Unicode's `Default_Ignorable_Code_Point`, and the braille pattern without dots.
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_INVISIBLE_CATEGORIES = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
"""Control and format characters, line ends, and code points without a character."""


def name_flaw(name: str) -> str | None:
    """Why this cannot be the name of an action type or attribute; None: it can.

    >>> name_flaw("add to cart"), name_flaw("cl\u200bick")
    (None, 'has the invisible character U+200B (ZERO WIDTH SPACE)')
    """
    if not name.strip():
        return "must not be blank"
    for character in name:
        if _is_invisible(character):
            known = unicodedata.name(character, "")
            return f"has the invisible character U+{ord(character):04X}" + (f" ({known})" if known else "")
    return "must not begin or end with a space" if name != name.strip() else None


def recipe_name_flaw(name: str) -> str | None:
    """Why this cannot be the name of a recipe; None: it can."""
    if re.fullmatch(RECIPE_NAME, name):
        return None
    return "must be of A-Z a-z 0-9 . _ - and begin with a letter or a digit"


def _is_invisible(character: str) -> bool:
    return bool(_IGNORABLE.match(character)) or unicodedata.category(character) in _INVISIBLE_CATEGORIES
