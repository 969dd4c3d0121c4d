"""Codes of errors in the output format, which clients and dashboards know by name."""

from shopr1_rewards.format_error import FormatError, FormatFailure, InvalidFormatError


def test_codes() -> None:
    assert {error.value for error in FormatError} == {
        "empty",
        "invalid_json",
        "not_an_object",
        "extra_text",
        "no_object",
        "duplicate_key",
        "non_finite_number",
        "too_deep",
        "lone_surrogate",
        "missing_rationale",
        "missing_action",
        "missing_action_type",
        "wrong_type",
        "unknown_action_type",
        "missing_attribute",
        "extra_key",
    }
    assert f"{FormatError.TOO_DEEP}" == "too_deep"


def test_the_exception_carries_the_failure() -> None:
    error = InvalidFormatError(FormatError.EXTRA_TEXT, "text after it", 7)
    assert error.failure == FormatFailure(FormatError.EXTRA_TEXT, "text after it")
    assert (str(error), error.position) == ("text after it", 7)
    assert InvalidFormatError(FormatError.EMPTY, "nothing").position == 0
