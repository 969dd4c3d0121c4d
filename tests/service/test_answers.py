"""Plain answers: the fields of the wire models, and JSON that the models read back unchanged."""

import dataclasses
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopr1_client import wire
from shopr1_client.wire import PolicyRef, Reason, RecipeRef, Status
from shopr1_client.wire_prompt import ScoreWarning, WarningCode
from shopr1_service import answers
from shopr1_service.http.scoring import encode_response

NAMES = ("TokenCertainty", "Details", "Reward", "GroupScore", "ScoreResponse")

TEXT = st.text(max_size=8)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
LISTS = st.lists(TEXT, max_size=2)
IDS = st.none() | st.lists(st.integers(0, 2**31), max_size=3)
COMPONENTS = st.dictionaries(TEXT, st.none() | FLOATS, max_size=3)

TOKENS = st.builds(answers.TokenCertainty, st.integers(0, 99), st.integers(0, 2**31), FLOATS)
DETAILS = st.builds(
    answers.Details,
    format_error=st.none() | TEXT,
    format_message=st.none() | TEXT,
    predicted_action=st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
    unknown_action_type=st.booleans(),
    missing_attributes=LISTS,
    extra_keys=LISTS.map(tuple),
    converted=LISTS.map(tuple),
    similarity=COMPONENTS,
    type_match=st.booleans(),
    exact_match=st.booleans(),
    self_certainty_nats=st.none() | FLOATS,
    num_rationale_tokens=st.integers(0, 99),
    tokens=st.none() | st.lists(TOKENS, max_size=3),
    completion_token_ids=IDS,
)
REWARDS = st.builds(
    answers.Reward,
    reward=st.none() | FLOATS,
    status=st.sampled_from(Status),
    reason=st.none() | st.sampled_from(Reason),
    message=st.none() | TEXT,
    components=COMPONENTS,
    details=DETAILS,
)
WARNINGS = st.builds(ScoreWarning, code=st.sampled_from(WarningCode), message=TEXT)
GROUPS = st.builds(
    answers.GroupScore,
    id=st.none() | TEXT,
    policy_version=TEXT,
    policy_number=st.integers(0, 99),
    adapter=st.none() | TEXT,
    rewards=st.lists(REWARDS, max_size=3),
    warnings=st.lists(WARNINGS, max_size=2),
    prompt_token_ids=IDS,
)
RESPONSES = st.builds(
    answers.ScoreResponse,
    request_id=TEXT,
    recipe=st.builds(RecipeRef, name=TEXT, digest=TEXT),
    policy=st.builds(
        PolicyRef, model=TEXT, version=TEXT, number=st.integers(0, 99), adapter=st.none() | TEXT
    ),
    groups=st.lists(GROUPS, max_size=3),
)


@pytest.mark.parametrize("name", NAMES)
def test_the_fields_are_those_of_the_wire_model(name: str) -> None:
    fields = [field.name for field in dataclasses.fields(getattr(answers, name))]
    assert fields == list(getattr(wire, name).model_fields)


@given(RESPONSES)
def test_an_answer_is_written_like_its_wire_model(response: answers.ScoreResponse) -> None:
    written = orjson.loads(encode_response(response))
    model = wire.ScoreResponse.model_validate(response, from_attributes=True)
    assert same(written, model.model_dump(mode="json"))
    assert same(written, orjson.loads(model.model_dump_json()))
    assert wire.ScoreResponse.model_validate_json(encode_response(response)) == model


def same(left: Any, right: Any) -> bool:
    """Whether two JSON values are equal, with the type and sign of every number."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return repr(left) == repr(right)
