"""Fuzzes the bodies of all routes: every response is valid or a documented problem."""

import asyncio
import json
import sys
from copy import deepcopy
from typing import Any

import atheris

with atheris.instrument_imports(include=["shopr1_rewards", "shopr1_client", "shopr1_service"]):
    from shopr1_client.errors import PROBLEM_MEDIA_TYPE, PROBLEMS
    from shopr1_service.dialects import examples
    from shopr1_service.http.examples import SCORE_REQUESTS
    from shopr1_service.server.app import create_app

import httpx
from fastapi import FastAPI

from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.settings import Settings
from tests.integration.api.test_fuzz import places
from tests.integration.ops.fuzz.harness import fuzz
from tests.support.http import PROBLEM_KEYS, client_of, until_ready

ROUTES = (
    ("POST", "/score"),
    ("PUT", "/labels"),
    ("POST", "/dialects/openrlhf/get_reward"),
    ("POST", "/dialects/slime/reward"),
    ("POST", "/dialects/llama_factory/v1/score/evaluation"),
    ("POST", "/dialects/nemo_gym/seed_session"),
    ("POST", "/dialects/nemo_gym/verify"),
    ("POST", "/dialects/nemo_gym/aggregate_metrics"),
)
SEEDS: dict[int, list[Any]] = {
    0: [value["value"] for value in SCORE_REQUESTS.values()],
    1: [examples.LABELS_REQUEST],
    2: [examples.OPENRLHF_REQUEST],
    3: [examples.SLIME_REQUEST],
    4: [examples.LLAMA_FACTORY_REQUEST],
    5: [{}],
    6: [examples.NEMO_GYM_REQUEST],
    7: [example["value"] for example in examples.NEMO_GYM_METRICS.values()],
}
GRAFTS = (
    b"NaN",
    b"1e999",
    b"9" * 40,
    b'"\\ud800"',
    b'{"\\ud800": 1}',
    b"[" * 950 + b"]" * 950,
    b"null",
    b"[]",
)
MARK = "the place of the graft"
STATUSES = {problem.code: problem.status for problem in PROBLEMS} | {"internal": None}
"""`internal` is documented but not allowed: it is a bug of the service."""


class Service:
    """The application, whose event loop runs during a request."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._start(create_app(Settings(), LocalEngine.opener(FakePolicy))))

    async def _start(self, app: FastAPI) -> httpx.AsyncClient:
        self._lifespan = app.router.lifespan_context(app)
        await self._lifespan.__aenter__()
        client = client_of(app)
        await until_ready(client)
        return client

    def ask(self, method: str, path: str, body: bytes) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return self._runner.run(self._client.request(method, path, content=body, headers=headers))

    def stop(self) -> None:
        self._runner.run(self._lifespan.__aexit__(None, None, None))
        self._runner.close()


def check(service: Service, data: bytes) -> None:
    route, body = read(data)
    method, path = ROUTES[route]
    answered = service.ask(method, path, body)
    value = json.loads(answered.content, parse_constant=refuse)
    if answered.status_code == 200:
        assert answered.headers["Content-Type"] == "application/json"
    else:
        check_problem(answered, value)


def read(data: bytes) -> tuple[int, bytes]:
    """Route and body. The parity of the first byte selects the rest itself or a grafted seed."""
    if len(data) < 3:
        return 0, data
    route, body = data[0] // 2 % len(ROUTES), data[2:]
    return route, body if data[0] % 2 else grafted(SEEDS[route][0], data[1], body)


def grafted(value: Any, number: int, text: bytes) -> bytes:
    """A valid body in which this text replaces one of the values."""
    found = places(body := {"body": deepcopy(value)})
    container, key = found[number % len(found)]
    container[key] = MARK
    return json.dumps(body["body"]).encode().replace(json.dumps(MARK).encode(), text)


def refuse(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def check_problem(answered: httpx.Response, value: Any) -> None:
    assert answered.headers["Content-Type"] == PROBLEM_MEDIA_TYPE
    assert value.keys() == PROBLEM_KEYS
    assert answered.status_code == value["status"] == STATUSES[value["code"]], answered.text


def main() -> int:
    service = Service()
    bodies = [(route, value) for route, values in SEEDS.items() for value in values]
    seeds = [bytes([2 * route + 1, 0]) + json.dumps(value).encode() for route, value in bodies]
    grafts = [
        bytes([2 * route, place]) + graft
        for route, values in SEEDS.items()
        for place in range(1 + len(places(values[0])))
        for graft in GRAFTS
    ]
    fuzz(lambda data: check(service, data), seeds + grafts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
