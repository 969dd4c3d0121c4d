"""Estimates of memory against what Python takes, as `tracemalloc` counts it."""

import gc
import json
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from shopr1_client.wire import Include, PolicyRef, RecipeRef, ScoreRequest
from shopr1_service.answers import Details, GroupScore, Reward, ScoreResponse, TokenCertainty
from shopr1_service.core import Origin, PreparedGroup, Tokens
from shopr1_service.http.middleware.body_limits import BODY_COPIES
from shopr1_service.memory.sizes import answer_bytes, json_bytes, prepared_bytes, request_bytes
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.fake import CharacterCodec, FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.scoring.prepare import prepare
from shopr1_service.scoring.recipe_book import RecipeBook
from shopr1_service.scoring.scorer import Scorer
from shopr1_service.settings import Settings
from tests.support.http import CLICK, answer, group

LEAST, MOST = 0.85, 2.6
"""Estimates in units of what is taken."""

RANDOM = random.Random(1)
BOOK, SETTINGS = RecipeBook("shop_r1"), Settings()


class WordCodec(CharacterCodec):
    """Four characters are a token, and ids are as large as those of real vocabularies."""

    def encode_text(self, text: str) -> Tokens:
        starts = range(0, len(text), 4)
        return Tokens(text, [1000 + ord(text[i]) for i in starts], [(i, i + 4) for i in starts])

    def decode(self, ids: Any) -> Tokens:
        return Tokens("a" * len(ids), ids, [(i, i + 1) for i in range(len(ids))])


class WordPolicy(FakePolicy):
    def __init__(self) -> None:
        super().__init__()
        self.codec = WordCodec()


def text(num_chars: int, first: str = "") -> str:
    return first + "".join(RANDOM.choices("abcdefgh ", k=num_chars))


def ids(num_ids: int) -> dict[str, list[int]]:
    return {"token_ids": [RANDOM.randrange(300, 1000) for _ in range(num_ids)]}


def click(name: str, **more: Any) -> str:
    return answer({"type": "click", "name": name, **more}, text(30))


def completions(num: int, num_chars: int, first: str = "") -> list[str]:
    return [answer(CLICK, text(num_chars, first)) for _ in range(num)]


BODIES: dict[str, Callable[[], list[Any]]] = {
    "groups": lambda: [group(*completions(8, 160), prompt=text(400)) for _ in range(4)],
    "long": lambda: [group(*completions(4, 2000), prompt=text(20_000))],
    "wide": lambda: [group(*completions(8, 400, "😀"), prompt=text(4000, "😀")) for _ in range(2)],
    "ids": lambda: [group(*(ids(200) for _ in range(8)), prompt=ids(5_000))],
    "single": lambda: [group(*completions(1, 30), prompt=text(10)) for _ in range(40)],
    "chats": lambda: [
        group(*completions(1, 30), prompt=[{"role": "user", "content": text(20)} for _ in range(5)])
        for _ in range(20)
    ],
    "invalid": lambda: [group(*(text(20) for _ in range(50))) for _ in range(2)],
    "long actions": lambda: [group(*(click(text(2000)) for _ in range(8)))],
    "extra keys": lambda: [
        group(*(click("a", **{text(8) + str(i): "" for i in range(100)}) for _ in range(4)))
    ],
    "arguments": lambda: [
        group("x", prompt=[{"role": "user", "content": "a"}], chat_template_kwargs={"a": [[], {}, "x"] * 50})
        for _ in range(10)
    ],
}


class Taken:
    """Memory that objects take which are made in the block and kept."""

    def __enter__(self) -> "Taken":
        gc.collect()
        tracemalloc.start()
        self._before = tracemalloc.get_traced_memory()[0]
        return self

    def __exit__(self, *_: object) -> None:
        gc.collect()
        self.num_bytes = tracemalloc.get_traced_memory()[0] - self._before
        tracemalloc.stop()


def prepared(request: ScoreRequest) -> list[PreparedGroup]:
    return prepare(request, BOOK.default, WordCodec(), SETTINGS.limits, wants_ids=False)


@pytest.mark.parametrize("name", BODIES)
def test_a_parsed_request(name: str) -> None:
    encoded = json.dumps({"groups": BODIES[name]()}, ensure_ascii=False).encode()
    ScoreRequest.model_validate(json.loads(encoded))
    with Taken() as taken:
        body = bytes(bytearray(encoded))
        parsed = json.loads(body)
        request = ScoreRequest.model_validate(parsed)
    num_counted = BODY_COPIES * len(body) + request_bytes(request)
    assert LEAST <= num_counted / taken.num_bytes <= MOST


def plain(response: Any) -> ScoreResponse:
    """The objects of an answer, from its JSON."""
    recipe, policy = RecipeRef(**response["recipe"]), PolicyRef(**response["policy"])
    groups = [plain_group(group) for group in response["groups"]]
    return ScoreResponse(response["request_id"], recipe, policy, groups)


def plain_group(group: Any) -> GroupScore:
    return GroupScore(**{**group, "rewards": list(map(plain_reward, group["rewards"]))})


def plain_reward(reward: Any) -> Reward:
    details = reward["details"]
    tokens = None if details["tokens"] is None else [TokenCertainty(**each) for each in details["tokens"]]
    return Reward(**{**reward, "details": Details(**{**details, "tokens": tokens})})


async def response_to(request: ScoreRequest) -> str:
    scorer = Scorer(LocalEngine(WordPolicy(), SETTINGS, Metrics()), BOOK, SETTINGS, Metrics())
    try:
        return (await scorer.score(request, Origin("a"))).model_dump_json()
    finally:
        scorer.close()


@pytest.mark.anyio
@pytest.mark.parametrize("name", BODIES)
async def test_a_prepared_request_with_its_answer_and_a_kept_answer(name: str) -> None:
    groups = BODIES[name]()
    for include in ([], list(Include)):
        request = ScoreRequest.model_validate({"groups": groups, "include": include})
        encoded = await response_to(request)
        prepared(request)
        with Taken() as taken:
            queued = prepared(request)
        with Taken() as taken_by_answer:
            response = plain(json.loads(encoded))
        num_taken = taken.num_bytes + taken_by_answer.num_bytes
        assert LEAST <= prepared_bytes(request, queued) / num_taken <= MOST
        if not include:  # only these are kept
            assert LEAST <= answer_bytes(response) / taken_by_answer.num_bytes <= MOST


def test_json_of_any_shape() -> None:
    encoded = json.dumps([{"key": [1000, 2000.5, "text", None, [[]], {}]} for _ in range(1000)])
    with Taken() as taken:
        value = json.loads(encoded)
    assert LEAST <= json_bytes(value) / taken.num_bytes <= MOST
