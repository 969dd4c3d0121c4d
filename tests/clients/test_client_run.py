"""The run that a client names."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shopr1_client import AsyncClient, Client
from shopr1_client.errors import InvalidRequestError
from shopr1_client.grouping import Rollout
from shopr1_client.trainers.service import Service
from shopr1_client.wire import ScoreRequest
from tests.support.http import TERMINATE, answer, group, served


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served() as url:
        yield url


def request(prompt: str) -> ScoreRequest:
    return ScoreRequest.model_validate({"groups": [group(answer(), prompt=prompt)]})


def rollout(prompt: str) -> Rollout:
    return Rollout(prompt=prompt, completion=answer(), ground_truth=TERMINATE)


def num_scored(url: str, run: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
        for sample in family.samples
        if sample.name == "shopr1_rollouts_total" and sample.labels["run"] == run
    )


def test_both_clients_send_their_run(url: str) -> None:
    with Client(url, run="sync") as client:
        client.score(request("one"))
    asyncio.run(AsyncClient(url, run="async").score(request("two")))
    assert (num_scored(url, "sync"), num_scored(url, "async")) == (1, 1)


def test_a_client_without_a_run_names_none(url: str) -> None:
    with Client(url) as client:
        client.score(request("three"))
    assert num_scored(url, "") == 1


def test_a_run_that_is_no_label_is_refused(url: str) -> None:
    with Client(url, run="no label", retry_for_s=0) as client, pytest.raises(InvalidRequestError):
        client.score(request("four"))


def test_shims_take_it_from_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOPR1_CLIENT_RUN", "from-the-environment")
    service, rollouts = Service.find(url), [rollout("five"), rollout("six")]
    assert len(service.score_sync(rollouts)) == 2
    assert len(asyncio.run(service.score([rollout("seven")]))) == 1
    assert num_scored(url, "from-the-environment") == 3
    assert Service.find(url, run="given").run == "given"
