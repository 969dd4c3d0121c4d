"""The access log: one line for each request."""

import pytest

from tests.support.http import WAIT_S, answer, group, post, running
from tests.support.log_lines import noting
from tests.support.trainer_requests import SLIME, slime

pytestmark = pytest.mark.anyio


async def test_a_line_for_each_request() -> None:
    with noting("shopr1_service.access") as lines:
        async with running(access_log=True) as client:
            lines.clear()
            groups = [group(answer(), answer()), group(answer(), prompt="another")]
            headers = {"X-Request-ID": "r1", "X-Run-ID": "a"}
            await post(client, {"groups": groups}, **headers)
            await client.post(SLIME, json=slime())
            await post(client, {"groups": "none"})
            await client.get("/recipes/nope")
            await client.get("/nowhere/at/all")
            await client.request("BREW", "/score")
    [first, *_] = lines
    assert 0 < first.pop("duration_s") < WAIT_S
    assert first.pop("time")
    assert first == {
        "level": "info",
        "logger": "shopr1_service.access",
        "message": "POST /score 200",
        "request_id": "r1",
        "run": "a",
        "method": "POST",
        "route": "/score",
        "status": 200,
        "num_groups": 2,
        "num_rollouts": 3,
    }
    assert [(line["message"], line.get("num_rollouts")) for line in lines[1:]] == [
        (f"POST {SLIME} 200", 1),
        ("POST /score 422", None),
        ("GET /recipes/{name} 404", None),
        ("GET unknown 404", None),
        ("unknown /score 405", None),
    ]


async def test_machines_that_ask_all_the_time_are_logged_at_debug_only() -> None:
    with noting("shopr1_service.access") as lines:
        async with running(access_log=True) as client:
            lines.clear()
            for path in ("/health/live", "/health/ready", "/metrics", "/info"):
                await client.get(path)
    assert [line["level"] for line in lines] == ["debug", "debug", "debug", "info"]


async def test_no_access_log_no_lines() -> None:
    with noting("shopr1_service.access") as lines:
        async with running(access_log=False) as client:
            await post(client, {"groups": [group(answer())]})
    assert lines == []
