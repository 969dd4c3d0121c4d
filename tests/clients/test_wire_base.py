"""Bases of the wire models: unions by JSON type, and text that can be encoded."""

from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Tag, TypeAdapter, ValidationError

from shopr1_client.wire_base import (
    NUMBER,
    OBJECT,
    STRING,
    TEXT,
    UnicodeText,
    by_type,
    is_unicode,
    is_union_tag,
)

UNION: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        Annotated[str, Tag(STRING)]
        | Annotated[int, Tag(NUMBER)]
        | Annotated[dict[str, int], Tag(OBJECT)]
        | Annotated[dict[str, str], Tag(TEXT)],
        by_type({STRING: str, NUMBER: int, OBJECT: dict}, "kind", "must be one of these", text_key=True),
    ]
)


@pytest.mark.parametrize(
    ("part", "expected"), [("<text>", True), ("text", False), (0, False), ("", False), ("te<xt>", False)]
)
def test_union_tags(part: str | int, expected: bool) -> None:
    assert is_union_tag(part) is expected


@pytest.mark.parametrize("value", ["1", 1, {"a": 1}, {"text": "a"}], ids=str)
def test_the_json_type_chooses_the_member(value: Any) -> None:
    assert UNION.validate_python(value) == value


@pytest.mark.parametrize(("value", "location"), [({"a": "x"}, (OBJECT, "a")), ({"text": 1}, (TEXT, "text"))])
def test_errors_are_those_of_the_chosen_member(value: Any, location: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        UNION.validate_python(value)
    assert [error["loc"] for error in caught.value.errors()] == [location]


@pytest.mark.parametrize("value", [True, None, 1.5, []], ids=str)
def test_other_types_have_an_error_of_their_own(value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        UNION.validate_python(value)
    assert [(error["type"], error["msg"]) for error in caught.value.errors()] == [
        ("kind", "must be one of these")
    ]


@given(st.text(st.characters(exclude_categories=())))
def test_text_is_valid_without_half_surrogate_pairs(text: str) -> None:
    expected = not any("\ud800" <= char <= "\udfff" for char in text)
    assert is_unicode(text) is expected
    if expected:
        assert TypeAdapter(UnicodeText).validate_python(text) == text
    else:
        with pytest.raises(ValidationError, match="half a surrogate pair"):
            TypeAdapter(UnicodeText).validate_python(text)
