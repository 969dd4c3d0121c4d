"""Pydantic's errors in plain sentences."""

from enum import StrEnum
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from shopr1_client.field_messages import field_path, plain_message
from shopr1_client.wire_base import matches


class Size(StrEnum):
    SMALL = "small"
    LARGE = "large"


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    number: int


def _refuse(_value: object) -> object:
    raise ValueError("must be a prime")


def _refuse_by_type(_value: object) -> object:
    raise PydanticCustomError("own", "must be {what}", {"what": "a square"})


Bounded = Annotated[float, Field(gt=0, le=5, allow_inf_nan=False)]
Sized = Annotated[str, Field(min_length=1, max_length=3)]
Long = Annotated[str, Field(min_length=2)]
Items = Annotated[list[int], Field(min_length=1, max_length=2)]
Pairs = Annotated[list[int], Field(min_length=2)]


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Inner, {}, "it is missing"),
        (Inner, {"number": 1, "more": 2}, "unknown field"),
        (Inner, 7, "must be an object"),
        (dict[str, int], [], "must be an object"),
        (str, 7, "must be a string"),
        (int, "x", "must be an integer"),
        (int, 2.5, "must be an integer"),
        (int, None, "must be an integer"),
        (int, "1" * 5000, "has too many digits"),
        (float, "x", "must be a number"),
        (float, [], "must be a number"),
        (bool, "x", "must be true or false"),
        (bool, [], "must be true or false"),
        (list[int], "x", "must be a list"),
        (tuple[int, ...], 5, "must be a list"),
        (Literal["a", "b", 3], "c", "must be 'a', 'b' or 3"),
        (Size, "medium", "must be 'small' or 'large'"),
        (Bounded, 0, "must be greater than 0"),
        (Bounded, 6, "must be at most 5"),
        (Bounded, float("nan"), "must be a finite number"),
        (Annotated[int, Field(ge=3)], 2, "must be at least 3"),
        (Annotated[int, Field(lt=3)], 4, "must be less than 3"),
        (Sized, "", "must not be empty"),
        (Sized, "long", "must have at most 3 characters"),
        (Long, "a", "must have at least 2 characters"),
        (Items, [], "must not be empty"),
        (Items, [1, 2, 3], "must have at most 2 items"),
        (Pairs, [1], "must have at least 2 items"),
        (Annotated[Any, AfterValidator(_refuse)], 4, "must be a prime"),
        (Annotated[Any, AfterValidator(_refuse_by_type)], 4, "must be a square"),
        (Annotated[str, AfterValidator(matches("[a-z]+", "must be of a-z"))], "a\n", "must be of a-z"),
    ],
)
def test_messages(kind: Any, value: object, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(value)
    assert plain_message(caught.value.errors()[0]).removesuffix(".0") == message


def test_braces_in_a_message_are_kept() -> None:
    def refuse(_value: object) -> object:
        raise ValueError("must be {x} or {0}")

    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Annotated[Any, AfterValidator(refuse)]).validate_python(1)
    assert plain_message(caught.value.errors()[0]) == "must be {x} or {0}"


def test_text_that_is_no_json() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(int).validate_json("{")
    assert plain_message(caught.value.errors()[0]).startswith("not JSON: EOF while parsing")


def test_a_type_without_a_sentence_of_its_own() -> None:
    error = {"type": "url_type", "msg": "URL input should be a string or URL"}
    assert plain_message(error) == error["msg"]
    error = {"type": "date_type", "msg": "Input should be a valid date"}
    assert plain_message(error) == "must be a valid date"


def test_paths() -> None:
    assert field_path(("groups", 1, "completions", 0, "<text>", "text")) == "groups[1].completions[0].text"
    assert field_path(("prompt", "<messages>", 2, "role")) == "prompt[2].role"
    assert field_path(()) == ""
