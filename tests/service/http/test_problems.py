"""Refused requests: their problems, and that nothing of them is scored."""

import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import httpx
import pytest

from shopr1_client.errors import PROBLEMS
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, TokenGroup, Unmeasurable, Version
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from tests.support.held import Loader
from tests.support.http import (
    answer,
    client_of,
    group,
    metric,
    post,
    problem,
    rewards,
    running,
    score,
    until_ready,
)

pytestmark = pytest.mark.anyio

HALF_PAIR = "\ud83d"
ABSENT = object()


# --- 422 --------------------------------------------------------------------------------------------


def with_field(key: str, value: Any) -> dict[str, Any]:
    """A request that is right except for one field of its second group; `/x` is a field of the request."""
    first, second = group(answer(), id="right"), group(answer(), answer(), id="wrong")
    body: dict[str, Any] = {"groups": [first, second]}
    target = body if key.startswith("/") else second
    if value is ABSENT:
        del target[key.removeprefix("/")]
    else:
        target[key.removeprefix("/")] = value
    return body


def ids(*values: Any) -> dict[str, Any]:
    return {"token_ids": list(values)}


WRONG_FIELDS: list[tuple[str, Any, str]] = [
    ("/groups", ABSENT, "groups"),
    ("/groups", None, "groups"),
    ("/groups", {}, "groups"),
    ("/groups", "all", "groups"),
    ("/groups", [3], "groups[0]"),
    ("/groups", [group(), None], "groups[1]"),
    ("/group", [], "group"),
    ("/recipe", 3, "recipe"),
    ("/recipe", "nope", "recipe"),
    ("/policy_version", 0, "policy_version"),
    ("/include", "tokens", "include"),
    ("/include", None, "include"),
    ("/include", ["tokens", "token"], "include[1]"),
    ("id", 7, "groups[1].id"),
    ("reward", 1.0, "groups[1].reward"),
    ("<b>", 1, "groups[1].<b>"),
    ("prompt", ABSENT, "groups[1].prompt"),
    ("prompt", None, "groups[1].prompt"),
    ("prompt", 5, "groups[1].prompt"),
    ("prompt", True, "groups[1].prompt"),
    ("prompt", HALF_PAIR, "groups[1].prompt"),
    ("prompt", ["hi"], "groups[1].prompt[0]"),
    ("prompt", [{"role": "user"}], "groups[1].prompt[0].content"),
    ("prompt", [{"role": 1, "content": "hi"}], "groups[1].prompt[0].role"),
    ("prompt", [{"role": "user", "content": None}], "groups[1].prompt[0].content"),
    ("prompt", [{"role": "user", "content": "hi", "name": "x"}], "groups[1].prompt[0].name"),
    ("prompt", {}, "groups[1].prompt.token_ids"),
    ("prompt", {"token_ids": "12"}, "groups[1].prompt.token_ids"),
    ("prompt", {"token_ids": [1], "text": "hi"}, "groups[1].prompt.text"),
    ("prompt", ids(1, -1), "groups[1].prompt.token_ids[1]"),
    ("prompt", ids(1.5), "groups[1].prompt.token_ids[0]"),
    ("prompt", ids(1.0), "groups[1].prompt.token_ids[0]"),
    ("prompt", ids("1"), "groups[1].prompt.token_ids[0]"),
    ("prompt", ids(True), "groups[1].prompt.token_ids[0]"),
    ("prompt", ids(None), "groups[1].prompt.token_ids[0]"),
    ("prompt", ids(0, 0x110000), "groups[1].prompt.token_ids[1]"),
    ("prompt", ids(10**30), "groups[1].prompt.token_ids[0]"),
    ("ground_truth", ABSENT, "groups[1].ground_truth"),
    ("ground_truth", None, "groups[1].ground_truth"),
    ("ground_truth", 5, "groups[1].ground_truth"),
    ("ground_truth", [], "groups[1].ground_truth"),
    ("ground_truth", {}, "groups[1].ground_truth.type"),
    ("ground_truth", {"type": None}, "groups[1].ground_truth.type"),
    ("ground_truth", {"type": "scroll"}, "groups[1].ground_truth.type"),
    ("ground_truth", {"type": HALF_PAIR}, "groups[1].ground_truth.type"),
    ("ground_truth", {"type": "click"}, "groups[1].ground_truth.name"),
    ("ground_truth", {"type": "click", "name": None}, "groups[1].ground_truth.name"),
    ("ground_truth", {"type": "click", "name": HALF_PAIR}, "groups[1].ground_truth.name"),
    ("ground_truth", {"type": "type_and_submit", "name": ""}, "groups[1].ground_truth.text"),
    ("ground_truth", "", "groups[1].ground_truth"),
    ("ground_truth", "click", "groups[1].ground_truth"),
    ("ground_truth", "[]", "groups[1].ground_truth"),
    ("ground_truth", '{"type": "click"}', "groups[1].ground_truth"),
    ("ground_truth", '{"type": "terminate", "x": NaN}', "groups[1].ground_truth"),
    ("ground_truth", "[" * 100_000, "groups[1].ground_truth"),
    ("completions", ABSENT, "groups[1].completions"),
    ("completions", None, "groups[1].completions"),
    ("completions", "text", "groups[1].completions"),
    ("completions", {"text": "x"}, "groups[1].completions"),
    ("completions", [answer(), None], "groups[1].completions[1]"),
    ("completions", [answer(), 1], "groups[1].completions[1]"),
    ("completions", [["x"]], "groups[1].completions[0]"),
    ("completions", [{}], "groups[1].completions[0].token_ids"),
    ("completions", [{"text": 1}], "groups[1].completions[0].text"),
    ("completions", [{"text": "x", "token_ids": [1]}], "groups[1].completions[0].token_ids"),
    ("completions", [{"token_ids": None}], "groups[1].completions[0].token_ids"),
    ("completions", ["", ids(0, -1)], "groups[1].completions[1].token_ids[1]"),
    ("completions", ["", ids(0x110000)], "groups[1].completions[1].token_ids[0]"),
    ("completions", ["", ids("7")], "groups[1].completions[1].token_ids[0]"),
]


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[httpx.AsyncClient]:
    async with running() as client:
        yield client


@pytest.mark.parametrize(
    ("key", "value", "location"),
    [pytest.param(*case, id=f"{i}: {case[2]}") for i, case in enumerate(WRONG_FIELDS)],
)
async def test_a_wrong_field_is_named_and_nothing_is_scored(
    service: httpx.AsyncClient, key: str, value: Any, location: str
) -> None:
    before = await metric(service, "shopr1_rollouts_total")
    body = problem(await post(service, with_field(key, value)), 422, "invalid_request")
    assert [error["location"] for error in body["errors"]] == [location]
    assert body["errors"][0]["message"] in body["detail"]
    assert body["errors"][0]["message"]
    assert await metric(service, "shopr1_rollouts_total") == before


async def test_the_policy_does_not_see_a_refused_request() -> None:
    calls: list[None] = []
    async with running(FakePolicy(before_scoring=lambda: calls.append(None))) as client:
        refused = await post(client, with_field("ground_truth", {"type": "scroll"}))
        assert not calls
        await score(client, group(answer()))
    assert refused.status_code == 422
    assert len(calls) == 1


async def test_all_wrong_fields_are_named(service: httpx.AsyncClient) -> None:
    groups = [{"prompt": 1, "completions": [2, "right", {"text": 3}]}, group(), {"ground_truth": []}]
    body = problem(await post(service, {"groups": groups, "x": 4}), 422, "invalid_request")
    assert [error["location"] for error in body["errors"]] == [
        "groups[0].prompt",
        "groups[0].ground_truth",
        "groups[0].completions[0]",
        "groups[0].completions[2].text",
        "groups[2].prompt",
        "groups[2].ground_truth",
        "groups[2].completions",
        "x",
    ]
    assert body["detail"].startswith("groups[0].prompt: ")
    assert body["detail"].endswith("; and 5 more")


@pytest.mark.parametrize(("key", "value"), [("group_id", "g"), ("group_id", None), ("group_size", 2)])
async def test_groups_in_parts_are_refused(service: httpx.AsyncClient, key: str, value: Any) -> None:
    body = problem(await post(service, with_field(key, value)), 422, "invalid_request")
    assert body["errors"] == [{"location": f"groups[1].{key}", "message": "unknown field"}]


async def test_all_impossible_values_are_named(service: httpx.AsyncClient) -> None:
    groups = [
        group(ids(0x110000), "", ids(0x110000), truth="no", prompt=ids(0x110000)),
        group(answer()),
        group(truth={"type": "click"}, prompt=ids(1, 0x110000)),
    ]
    body = problem(await post(service, {"groups": groups}), 422, "invalid_request")
    assert [error["location"] for error in body["errors"]] == [
        "groups[0].ground_truth",
        "groups[0].completions[0].token_ids[0]",
        "groups[0].completions[2].token_ids[0]",
        "groups[0].prompt.token_ids[0]",
        "groups[2].ground_truth.name",
        "groups[2].prompt.token_ids[1]",
    ]


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"3", b'"groups"', b"NaN"])
async def test_a_body_that_is_no_object(service: httpx.AsyncClient, body: bytes) -> None:
    refused = problem(await post(service, body), 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == ["body"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_body_of_another_media_type(service: httpx.AsyncClient, content_type: str) -> None:
    response = await post(service, {"groups": []}, **{"Content-Type": content_type})
    problem(response, 422, "invalid_request")


# --- 400 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"{", "at character 1"),
        (b'{"groups": []', "at character 13"),
        (b'{"groups": [],}', "at character 14"),
        (b'{"groups": []} {}', "at character 15"),
        (b"{'groups': []}", "at character 1"),
        # { is at 0, the quotes at 1 and 3, and at 4 the colon is missing. In bytes it would be 5.
        ('{"é"}'.encode(), "at character 4"),
        (b'{"groups": "\x00"}', "at character 12"),
        (b'{"groups": "\xff"}', "not UTF-8"),
        (b"\x80", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"groups": ' * 100_000, "nested too deeply"),
        (b'{"groups": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b"1" * 5_000, ""),  # Python refuses to read such a number
    ],
)
async def test_a_body_that_is_no_json(service: httpx.AsyncClient, body: bytes, detail: str) -> None:
    before = await metric(service, "shopr1_rollouts_total")
    assert detail in problem(await post(service, body), 400, "malformed_body")["detail"]
    assert await metric(service, "shopr1_rollouts_total") == before


@pytest.mark.parametrize("depth", [100, 300, 500, 700, 900, 1_100])
async def test_any_depth_is_an_answer(service: httpx.AsyncClient, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    bodies = [
        f'{{"groups": {deep}}}',
        f'{{"groups": [{{"prompt": "", "ground_truth": {{"type": {deep}}}, "completions": []}}]}}',
        f'{{"groups": [{{"prompt": "", "ground_truth": {{"x": {deep}}}, "completions": [{deep}]}}]}}',
    ]
    responses = [await post(service, body.encode()) for body in bodies]
    assert {response.status_code for response in responses} <= {400, 422}


async def test_a_body_that_can_be_read_and_not_written_again(service: httpx.AsyncClient) -> None:
    """Python's JSON writer reaches its recursion limit a few levels before the reader does."""
    for depth in range(880, 1_000):
        deep = "[" * depth + "]" * depth
        body = f'{{"groups": [{{"prompt": "", "ground_truth": {{"x": {deep}}}, "completions": []}}]}}'
        response = await post(service, body.encode())
        assert response.status_code in (400, 422), depth


# --- 413 --------------------------------------------------------------------------------------------


PROMPT_AND_ANSWERS = [group(answer(), answer(), prompt="four"), group(answer(), prompt={"token_ids": [1, 2]})]
NUM_TOKENS = 3 * len(answer()) + 4 + 2


@pytest.mark.parametrize(
    ("setting", "at_limit", "beyond"),
    [
        ({"max_groups": 2}, [group()] * 2, [group()] * 3),
        ({"max_completions_per_group": 2}, [group("", "")] * 2, [group("", ""), group("", "", "")]),
        ({"max_request_tokens": NUM_TOKENS}, PROMPT_AND_ANSWERS, [*PROMPT_AND_ANSWERS, group(ids(1))]),
        ({"max_request_tokens": NUM_TOKENS}, PROMPT_AND_ANSWERS, [*PROMPT_AND_ANSWERS, group(prompt=ids(1))]),
    ],
)
async def test_limits(setting: dict[str, Any], at_limit: list[Any], beyond: list[Any]) -> None:
    [(name, limit)] = setting.items()
    async with running(**setting) as client:
        await score(client, *at_limit)
        before = await metric(client, "shopr1_rollouts_total")
        body = problem(await post(client, {"groups": beyond}), 413, "too_large")
        assert await metric(client, "shopr1_rollouts_total") == before
    assert name in body["detail"]
    assert str(limit) in body["detail"]


# --- 404, 405 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/nope", "/score/x", "/recipes/nope", "/recipes/%ff", "/health"])
async def test_not_found(service: httpx.AsyncClient, path: str) -> None:
    problem(await service.get(path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/score", "POST"),
        ("PUT", "/score", "POST"),
        ("POST", "/info", "GET"),
        ("BREW", "/metrics", "GET"),
    ],
)
async def test_method_not_allowed(service: httpx.AsyncClient, method: str, path: str, allowed: str) -> None:
    response = await service.request(method, path)
    problem(response, 405, "method_not_allowed")
    assert response.headers["Allow"] == allowed


# --- 500 --------------------------------------------------------------------------------------------


class Buggy(FakePolicy):
    """Raises, which a policy must not."""

    is_buggy = True

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        if self.is_buggy:
            raise ZeroDivisionError("secret of the engine")
        return super().certainties(groups, rules, version)


async def test_a_bug_is_logged_and_its_details_are_not_returned(caplog: pytest.LogCaptureFixture) -> None:
    policy = Buggy()
    async with running(policy) as client:
        response = await post(client, {"groups": [group(answer())] * 3}, **{"X-Request-ID": "bug-1"})
        policy.is_buggy = False
        assert (await rewards(client, answer()))[0]["reward"] == 0.93
        num_failed = await metric(client, "shopr1_requests_total", route="/score", status="500")
    body = problem(response, 500, "internal")
    assert body["request_id"] == "bug-1"
    assert not re.search("secret|ZeroDivisionError|Traceback|File ", response.text)
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)
    assert num_failed == 1


async def test_the_log_of_a_bug_names_the_request(caplog: pytest.LogCaptureFixture) -> None:
    async with running(Buggy()) as client:
        await post(client, {"groups": [group(answer())]}, **{"X-Request-ID": "bug-2"})
    # The answer says: "Its log has the details under the request id."
    assert "bug-2" in caplog.text


# --- every problem ----------------------------------------------------------------------------------

Request = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]

REQUESTS: dict[str, Request] = {
    "malformed_body": lambda client: post(client, b"{"),
    "not_found": lambda client: client.get("/nope"),
    "method_not_allowed": lambda client: client.get("/score"),
    "policy_version": lambda client: post(client, {"groups": [], "policy_version": "7"}),
    "too_large": lambda client: post(client, {"groups": [group()] * 9}),
    "invalid_request": lambda client: post(client, {}),
    "internal": lambda client: post(client, {"groups": [group(answer())]}),
    "not_ready": lambda client: client.get("/health/ready"),
}


# Those of a busy engine are in test_deadline.py, of keys in test_auth.py, of the dialects in dialects/.
ELSEWHERE = (
    "unauthenticated",
    "forbidden",
    "request_timeout",
    "overloaded",
    "deadline_exceeded",
    "unscorable",
    "update_conflict",
    "invalid_weights",
    "storage",
)
IDLE = [expected for expected in PROBLEMS if expected.code not in ELSEWHERE]


@pytest.mark.parametrize("expected", IDLE, ids=lambda problem_class: problem_class.code)
async def test_every_problem_has_every_key(expected: Any) -> None:
    load = Loader()
    app = create_app(
        Settings(max_groups=8), LocalEngine.opener(load if expected.code == "not_ready" else Buggy)
    )
    async with app.router.lifespan_context(app), client_of(app) as client:
        if expected.code != "not_ready":
            await until_ready(client)
        response = await REQUESTS[expected.code](client)
        load.may_go_on.set()
    body = problem(response, expected.status, expected.code)
    assert body["title"] == expected.title
