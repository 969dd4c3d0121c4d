"""Errors of recipes in words."""

from typing import Any

import pytest
from pydantic_core import ErrorDetails

from shopr1_rewards.recipe_flaws import DARS, NUMBER, flaw


def details(kind: str, *location: str | int, message: str = "", given: Any = 7) -> ErrorDetails:
    return {"type": kind, "loc": location, "msg": message, "input": given}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (details("missing", "format", "reward"), "missing key 'format.reward'"),
        (details("extra_forbidden", "a b", "c"), "unknown key '\"a b\".c'"),
        (details("dict_type", "types", "click"), "types.click: must be a table (got 7)"),
        (
            details("float_type", "value", NUMBER, message="Input should be a valid number"),
            "value: must be a valid number (got 7)",
        ),
        (
            details("literal_error", "value", DARS, message="Input should be 'dars'"),
            "value: must be 'dars' (got 7)",
        ),
        (
            details("enum", "components", 1, message="Input should be 'a'"),
            "components[1]: must be 'a' (got 7)",
        ),
        (
            details("name", "types", "cl\u200bick", "[key]", message="is odd"),
            'types."cl\\u200bick": is odd (got 7)',
        ),
        (details("impossible", "format", message="both cannot be"), "format: both cannot be"),
        (details("model_type"), "must be a table (got 7)"),
        (
            details("string_type", "name", given=10**5000),
            "name: must be a string (got an integer with thousands of digits)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value["type"],
)
def test_flaws(error: ErrorDetails, expected: str) -> None:
    assert flaw(error) == expected
