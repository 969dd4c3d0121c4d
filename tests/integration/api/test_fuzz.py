"""Any completion is scored, and any request is answered."""

import json
import math
import random
from collections.abc import AsyncIterator, Callable
from copy import deepcopy
from typing import Any

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shopr1_client.wire import ScoreResponse
from shopr1_rewards import FormatError
from shopr1_service.policy.fake import FakePolicy
from tests.support.http import CLICK, PROBLEM_KEYS, SEARCH, TERMINATE, answer, post, running, score

pytestmark = pytest.mark.anyio

NUM_OF_A_KIND = 2_000
PER_GROUP = 250


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[httpx.AsyncClient]:
    async with running(FakePolicy(7.0, 0.25, max_sequence_tokens=40)) as client:
        yield client


# --- completions ------------------------------------------------------------------------------------

ANSWERS = [
    *map(answer, (TERMINATE, CLICK, SEARCH, {"type": "scroll", "by": "1"})),
    answer(SEARCH, 'a "quoted" word\n and 漢字 and 😀'),
    answer(CLICK, "") + "<end>",
    json.dumps({"rationale": "é", "action": SEARCH, "more": [1, 2.5e3, None, {"x": [True]}]}),
]
PIECES = [
    *'{}[]",:\\',
    *('"rationale"', '"action"', '"type"', '"name"', '"text"', '"click"', '"terminate"'),
    *("null", "NaN", "-Infinity", "1e999", "-", "9" * 30, '"\\ud800"', "\\u0000"),
    *("<end>", " ", "\n", "\x00", "\ufeff", "\ud800", "😀"),
    *("```json\n", '{"rationale": "r", "action": {"type": "terminate"}}', "[" * 70),
]

Write = Callable[[random.Random], str]


def random_bytes(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 2, 5, 20, 200)))


def mutated(rng: random.Random) -> str:
    """An answer with a few characters dropped, doubled, changed or put in."""
    text = rng.choice(ANSWERS)
    for _ in range(rng.randint(1, 3)):
        start = rng.randint(0, len(text))
        end = min(len(text), start + rng.choice((0, 0, 1, 1, 2, 10)))
        text = text[:start] + rng.choice(("", text[start:end] * 2, rng.choice(PIECES))) + text[end:]
    return text


def mutated_bytes(rng: random.Random) -> str:
    raw = bytearray(rng.choice(ANSWERS).encode())
    for _ in range(rng.randint(1, 3)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return raw.decode("utf-8", rng.choice(("replace", "surrogateescape")))


def pieces(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randint(0, 12)))


KINDS: dict[str, Write] = {
    "bytes as latin-1": lambda rng: random_bytes(rng).decode("latin-1"),
    "bytes as utf-8, replaced": lambda rng: random_bytes(rng).decode("utf-8", "replace"),
    "bytes as utf-8, escaped": lambda rng: random_bytes(rng).decode("utf-8", "surrogateescape"),
    "answers, characters changed": mutated,
    "answers, bytes changed": mutated_bytes,
    "pieces of JSON": pieces,
}


def is_answer(text: str) -> bool:
    """Whether Python's own JSON, which forgives more, finds an answer in it."""
    try:
        value = json.loads(text.replace("<end>", ""))
        return isinstance(value["rationale"], str) and isinstance(value["action"]["type"], str)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return False


def check(reward: Any, text: str) -> None:
    """A reward must hold these whatever the completion was."""
    terms, details = list(reward["components"].values()), reward["details"]
    if reward["status"] == "unscorable":
        assert (reward["reward"], reward["reason"], terms[4]) == (None, "sequence_too_long", None)
    else:
        assert math.isfinite(reward["reward"])
        assert reward["reward"] == sum(terms)
        assert reward["reason"] is None
        assert (details["self_certainty_nats"] is None) is (details["num_rationale_tokens"] == 0)
    if details["format_error"] is not None:
        assert details["format_error"] in set(FormatError)
        assert (reward["reward"], details["predicted_action"]) == (0.0, None)
        assert details["format_message"]
    else:
        assert terms[0] == 0.5
        assert details["predicted_action"]["type"] or details["unknown_action_type"]
        assert is_answer(text)


async def scored(service: httpx.AsyncClient, texts: list[str], *, as_ids: bool) -> list[Any]:
    sent: list[Any] = [{"token_ids": list(map(ord, text))} for text in texts] if as_ids else texts
    truths = (TERMINATE, CLICK, SEARCH)
    groups = [
        {"prompt": "p", "ground_truth": truths[i % 3], "completions": sent[start : start + PER_GROUP]}
        for i, start in enumerate(range(0, len(sent), PER_GROUP))
    ]
    body = await score(service, *groups)
    ScoreResponse.model_validate(body)
    return [reward for group in body["groups"] for reward in group["rewards"]]


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
@pytest.mark.parametrize("kind", KINDS)
async def test_any_completion_is_scored(service: httpx.AsyncClient, kind: str, as_ids: bool) -> None:
    rng = random.Random(f"{kind} {as_ids}")
    texts = [KINDS[kind](rng) for _ in range(NUM_OF_A_KIND)]
    rewards = await scored(service, texts, as_ids=as_ids)
    assert len(rewards) == len(texts)
    for text, reward in zip(texts, rewards, strict=True):
        check(reward, text)


async def test_the_fuzz_reaches_both_sides(service: httpx.AsyncClient) -> None:
    """Or it would say nothing: among mutated answers are right ones, wrong ones, and most kinds of wrong."""
    rng = random.Random(0)
    texts = [write(rng) for write in (mutated, mutated_bytes, pieces) for _ in range(NUM_OF_A_KIND)]
    rewards = await scored(service, texts, as_ids=False)
    errors = {reward["details"]["format_error"] for reward in rewards}
    assert errors >= {None, "invalid_json", "extra_text", "duplicate_key", "wrong_type", "lone_surrogate"}
    assert {reward["status"] for reward in rewards} == {"scored", "unscorable"}


async def test_text_and_ids_are_scored_alike(service: httpx.AsyncClient) -> None:
    rng = random.Random(1)
    texts = [rng.choice((mutated, mutated_bytes, pieces))(rng) for _ in range(NUM_OF_A_KIND)]
    assert await scored(service, texts, as_ids=True) == await scored(service, texts, as_ids=False)


# --- bodies -----------------------------------------------------------------------------------------

VALID = {
    "recipe": "shop_r1",
    "groups": [
        {
            "id": "a",
            "prompt": [{"role": "user", "content": "hi"}],
            "ground_truth": CLICK,
            "completions": [answer(CLICK), {"text": "no"}, {"token_ids": [123, 125]}],
        },
        {"prompt": {"token_ids": [1]}, "ground_truth": json.dumps(SEARCH), "completions": [answer(SEARCH)]},
        {"prompt": "page", "ground_truth": {"type": "terminate"}, "completions": []},
    ],
    "policy_version": "0",
    "include": ["tokens", "token_ids"],
}

# Half surrogate pairs as well: JSON can say them.
text = st.sampled_from(["\ud800", "\udfff!"]) | st.text(st.characters(exclude_categories=()), max_size=5)
keys = st.sampled_from(["groups", "prompt", "token_ids", "text", "type", "name", "id", "<text>"]) | text
numbers = st.integers() | st.floats() | st.sampled_from([2**63, -1, 10**40])
scalars = st.none() | st.booleans() | numbers | text
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container below a value, with every key of it."""
    if not isinstance(value, dict | list):
        return []
    keys_of: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    inner = [place for key in keys_of for place in places(value[key])]
    return [*((value, key) for key in keys_of), *inner]


@st.composite
def requests(draw: st.DrawFn) -> Any:
    """The valid request with a few members replaced, dropped or put in."""
    body = deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(body)))
        change = draw(st.sampled_from(["replace", "drop", "add"]))
        if change == "replace":
            container[key] = draw(text if isinstance(container[key], str) else values)
        elif change == "drop":
            del container[key]
        elif isinstance(container, dict):
            container[draw(keys)] = draw(values)
        else:
            container.insert(key, draw(values))
        if not places(body):
            break
    return body


def check_answer(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 409, 413, 422), response.text
    body = response.json()
    if response.status_code == 200:
        ScoreResponse.model_validate(body)
    else:
        assert body.keys() == PROBLEM_KEYS
        assert body["status"] == response.status_code
    assert body["request_id"] == response.headers["X-Request-ID"]


@given(st.binary(max_size=60))
@example(b"\xef\xbb\xbf{}")
@example(b'{"groups": [], "groups": 1}')
@example(b'{"groups": [' + b"9" * 5_000 + b"]}")
async def test_any_bytes_are_answered(service: httpx.AsyncClient, body: bytes) -> None:
    check_answer(await post(service, body))


@given(values)
async def test_any_json_is_answered(service: httpx.AsyncClient, body: Any) -> None:
    check_answer(await post(service, body))


@settings(max_examples=300)
@given(requests())
async def test_almost_valid_requests_are_answered(service: httpx.AsyncClient, body: Any) -> None:
    check_answer(await post(service, body))


@given(st.data())
async def test_broken_requests_are_answered(service: httpx.AsyncClient, data: st.DataObject) -> None:
    raw = bytearray(json.dumps(VALID).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    check_answer(await post(service, bytes(raw[: data.draw(st.integers(0, len(raw)))])))


async def test_the_valid_request_is_valid(service: httpx.AsyncClient) -> None:
    assert (await post(service, VALID)).status_code == 200
