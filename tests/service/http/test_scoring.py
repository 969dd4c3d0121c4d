"""Every sample counts once, over a real socket: equal samples each, and a request that is sent again once."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shopr1_client import AsyncClient, Client
from shopr1_client.wire import ScoreRequest, ScoreResponse
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, TokenGroup, Unmeasurable, Version
from shopr1_service.policy.fake import FakePolicy
from tests.support.broken_connections import breaking_proxy, leaving
from tests.support.held import Held
from tests.support.http import CLICK, TERMINATE, WAIT_S, answer, group, served
from tests.support.rollout_files import lines
from tests.support.trainer_requests import (
    AIOHTTP,
    LLAMA_FACTORY,
    OPENRLHF,
    SLIME,
    VERIFY,
    request_of,
)

ROUTES = ["/score", OPENRLHF, SLIME, LLAMA_FACTORY, VERIFY]
SHARE_PREDICTED = "shopr1_actions_total"


def body_of(path: str, completion: str, label: Any = TERMINATE) -> dict[str, Any]:
    """One rollout, as a trainer sends it to this route."""
    return {"groups": [group(completion, truth=label)]} if path == "/score" else request_of(path, completion)


class Samples:
    """Counts of the samples' metrics by run."""

    def __init__(self, url: str, run: str = "") -> None:
        families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=WAIT_S).text)
        self._samples = [sample for family in families for sample in family.samples]
        self._run = run

    def sum(self, name: str, **labels: str) -> float:
        labels = labels | {"run": self._run}
        return sum(s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items())

    def counts(self) -> set[float]:
        """How many rollouts each of the metrics has, of which all have every scored rollout."""
        names = ("rollouts_total", "reward_count", "actions_total", "self_certainty_nats_count")
        more = ("rationale_tokens_count", "rationale_repetition_ratio_count")
        return {self.sum(f"shopr1_{name}") for name in (*names, *more)}

    def service(self, name: str, **labels: str) -> float:
        """A metric that has no run."""
        return sum(s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items())


class Counting(FakePolicy):
    """Counts the completions that it computes."""

    num_computed = 0

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        self.num_computed += sum(len(each.completions) for each in groups)
        return super().certainties(groups, rules, version)


# --- equal samples ----------------------------------------------------------------------------------


def collapsed(num_terminated: int, num_texts: int, num_others: int) -> list[str]:
    """Completions of a policy that mostly terminates, with few texts; the others differ."""
    ends = [answer(TERMINATE, f"I stop. {i % num_texts}") for i in range(num_terminated)]
    others = [answer(CLICK, f"rationale {i}") for i in range(num_others)]
    return [text for pair in zip(ends, others, strict=False) for text in pair] + ends[num_others:]


def send_one_by_one(url: str, path: str, bodies: Sequence[Any]) -> None:
    with httpx.Client(base_url=url, headers=AIOHTTP, timeout=WAIT_S) as client:
        for body in bodies:
            assert client.post(path, json=body).status_code == 200


def send_at_once(url: str, path: str, bodies: Sequence[Any]) -> None:
    async def run() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=url, headers=AIOHTTP, timeout=WAIT_S, limits=limits) as client:
            return await asyncio.gather(*(client.post(path, json=body) for body in bodies))

    assert {response.status_code for response in asyncio.run(run())} == {200}


in_both_ways = pytest.mark.parametrize("send", [send_one_by_one, send_at_once])


@in_both_ways
@pytest.mark.parametrize(
    ("path", "num_terminated", "num_texts", "num_others"),
    [(SLIME, 250, 25, 150), *((path, 25, 3, 15) for path in ROUTES)],
)
def test_equal_samples_count_each(
    tmp_path: Path,
    send: Callable[..., None],
    path: str,
    num_terminated: int,
    num_texts: int,
    num_others: int,
) -> None:
    """62.5 % of the policy's actions are `terminate`, in everything that an alert or a reader goes by."""
    texts = collapsed(num_terminated, num_texts, num_others)
    policy = Counting()
    with served(policy, rollout_log=tmp_path) as url:
        labels = {"labels": [{"prompt": "page", "ground_truth": TERMINATE}]}
        httpx.put(f"{url}/labels", json=labels, timeout=WAIT_S).raise_for_status()
        send(url, path, [body_of(path, text) for text in texts])
        samples = Samples(url)
    assert samples.counts() == {len(texts)}
    assert samples.sum(SHARE_PREDICTED, predicted_type="terminate") == 0.625 * len(texts)
    assert samples.sum("shopr1_exact_matches_total") == num_terminated
    assert samples.service("shopr1_retried_requests_total") == 0
    logged = Counter(line["predicted_action"]["type"] for line in lines(tmp_path))
    assert logged == {"terminate": num_terminated, "click": num_others}
    assert len({line["request_id"] for line in lines(tmp_path)}) == len(texts)
    assert policy.num_computed == num_texts + num_others  # equal texts are still computed once


# --- requests that are sent again ---------------------------------------------------------------------


def with_client(url: str, request: ScoreRequest) -> ScoreResponse:
    with Client(url, timeout_s=WAIT_S, retry_for_s=WAIT_S) as client:
        return client.score(request)


def with_async_client(url: str, request: ScoreRequest) -> ScoreResponse:
    return asyncio.run(AsyncClient(url, timeout_s=WAIT_S, retry_for_s=WAIT_S).score(request))


both = pytest.mark.parametrize("score", [with_client, with_async_client], ids=["sync", "async"])


@both
@pytest.mark.parametrize("num_sent_bytes", [0, 10])
@pytest.mark.parametrize("include", [[], ["tokens"]])
def test_a_retry_after_a_broken_connection_counts_once(
    tmp_path: Path, score: Callable[..., ScoreResponse], num_sent_bytes: int, include: list[str]
) -> None:
    groups = [group(answer(), answer(), answer(CLICK)), group(answer(), prompt="other")]
    request = ScoreRequest.model_validate({"groups": groups, "include": include})
    with (
        served(rollout_log=tmp_path) as url,
        breaking_proxy(url, num_to_break=2, num_sent_bytes=num_sent_bytes) as proxy,
    ):
        response = score(proxy.url, request)
        assert len({headers["idempotency-key"] for headers in proxy.headers}) == 1
        assert len(proxy.headers) == 3
        assert [len(each.rewards) for each in response.groups] == [3, 1]
        assert Samples(url).counts() == {4}
        assert Samples(url).service("shopr1_retried_requests_total") == 2
        score(proxy.url, request)  # other samples with the same text
        assert len({headers["idempotency-key"] for headers in proxy.headers}) == 2
        assert Samples(url).counts() == {8}
    assert len(lines(tmp_path)) == 8


@both
def test_parts_of_a_large_request_have_keys_of_their_own(score: Callable[..., ScoreResponse]) -> None:
    groups = [group(answer()) for _ in range(70)]
    with served() as url, breaking_proxy(url, num_to_break=1) as proxy:
        score(proxy.url, ScoreRequest.model_validate({"groups": groups}))
        assert len({headers["idempotency-key"] for headers in proxy.headers}) == 3
        assert len(proxy.headers) == 4
        assert Samples(url).counts() == {70}


@both
def test_no_part_counts_again_because_another_was_too_large(score: Callable[..., ScoreResponse]) -> None:
    """By the default limits there are two parts. The server takes the second only."""
    groups = [group(answer()) for _ in range(34)]
    with served(max_groups=3) as url:
        answered = score(url, ScoreRequest.model_validate({"groups": groups}))
        assert len(answered.groups) == 34
        assert Samples(url).counts() == {34}


@pytest.mark.parametrize("header", ["Idempotency-Key", "X-Request-ID"])
@pytest.mark.parametrize("path", ROUTES)
def test_a_request_with_the_same_key_counts_once(tmp_path: Path, path: str, header: str) -> None:
    with served(rollout_log=tmp_path) as url:
        labels = {"labels": [{"prompt": "page", "ground_truth": TERMINATE}]}
        httpx.put(f"{url}/labels", json=labels, timeout=WAIT_S).raise_for_status()

        def send(key: str, text: str = answer(), run: str = "") -> None:
            headers = {header: key, "X-Run-ID": run}
            body = body_of(path, text)
            assert httpx.post(url + path, json=body, headers=headers, timeout=WAIT_S).status_code == 200

        for key in ("a", "b", "a", "b", "a"):
            send(key)
        assert Samples(url).counts() == {2}
        send("a", answer(CLICK))  # an id that is used for another rollout, too
        assert Samples(url).counts() == {3}
        if path != LLAMA_FACTORY:  # which finds its labels by run
            send("a", run="other")
            assert Samples(url, "other").counts() == {1}
        assert Samples(url).service("shopr1_retried_requests_total") == 3
    assert len(lines(tmp_path)) == 3 + (path != LLAMA_FACTORY)


def test_a_malformed_key_is_refused_and_nothing_counts() -> None:
    with served() as url:
        for path in (SLIME, "/score"):
            headers = {"Idempotency-Key": "two words"}
            response = httpx.post(url + path, json=body_of(path, answer()), headers=headers, timeout=WAIT_S)
            assert response.status_code == 422
            assert response.json()["errors"][0]["location"] == "header.Idempotency-Key"
        assert Samples(url).counts() == {0}


# --- answers that were not delivered ------------------------------------------------------------------


@pytest.fixture
def policy() -> Iterator[Held]:
    policy = Held()
    yield policy
    policy.gate.set()


def until(condition: Callable[[], bool]) -> None:
    """Poll what happens on the server's own time."""
    for _ in range(int(WAIT_S * 100)):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("the condition has not become true")


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("is_computed_meanwhile", [False, True])
def test_an_answer_whose_client_has_gone_is_not_counted(
    tmp_path: Path, policy: Held, path: str, is_computed_meanwhile: bool
) -> None:
    """Trainers send no key. The answer to the second try counts, and is not computed again."""
    with served(policy, rollout_log=tmp_path) as url:
        labels = {"labels": [{"prompt": "page", "ground_truth": TERMINATE}]}
        httpx.put(f"{url}/labels", json=labels, timeout=WAIT_S).raise_for_status()
        body = body_of(path, answer())
        with leaving(url, path, body):
            assert policy.has_begun.wait(WAIT_S)
        closed = {"route": path, "status": "499"}
        until(lambda: Samples(url).service("shopr1_requests_total", **closed) == 1)
        if is_computed_meanwhile:
            policy.gate.set()
            done = {"phase": "engine"}
            until(lambda: Samples(url).service("shopr1_phase_duration_seconds_count", **done) == 1)
        assert Samples(url).counts() == {0}
        threading.Timer(0.05, policy.gate.set).start()
        assert httpx.post(url + path, json=body, timeout=WAIT_S).status_code == 200
        assert Samples(url).counts() == {1}
        assert Samples(url).service("shopr1_retried_requests_total") == 0
        assert httpx.post(url + path, json=body, timeout=WAIT_S).status_code == 200  # another sample
        assert Samples(url).counts() == {2}
    assert len(lines(tmp_path)) == 2
    assert len(policy.prompts) == 1


def test_an_answer_that_came_too_late_is_not_counted(tmp_path: Path, policy: Held) -> None:
    body = body_of("/score", answer())
    with served(policy, rollout_log=tmp_path) as url:
        late = httpx.post(f"{url}/score", json=body, headers={"X-Request-Timeout": "0.05"}, timeout=WAIT_S)
        assert late.status_code == 504
        policy.gate.set()
        assert Samples(url).counts() == {0}
        assert httpx.post(f"{url}/score", json=body, timeout=WAIT_S).status_code == 200
        assert Samples(url).counts() == {1}
    assert len(lines(tmp_path)) == 1


# --- runs -------------------------------------------------------------------------------------------


@in_both_ways
def test_runs_do_not_disturb_each_other(send: Callable[..., None], tmp_path: Path) -> None:
    """The same ids of groups, prompts and completions, with different truths."""
    with served(rollout_log=tmp_path) as url:
        for run, truth in (("a", TERMINATE), ("b", CLICK)):
            labels = {"labels": [{"prompt": "page", "ground_truth": truth}]}
            httpx.put(f"{url}/run/{run}/labels", json=labels, timeout=WAIT_S).raise_for_status()
        body = request_of(SLIME, answer(), label=None)
        for run in ("a", "b"):
            send(f"{url}/run/{run}", SLIME, [body] * 8)
            shared = {"groups": [group(answer(), id="g", truth=TERMINATE)]}
            send(f"{url}/run/{run}", "/score", [shared] * 4)
        counts = [Samples(url, run).counts() for run in ("a", "b")]
        matches = [Samples(url, run).sum("shopr1_exact_matches_total") for run in ("a", "b")]
        assert (
            httpx.post(url + SLIME, json=body, timeout=WAIT_S).status_code == 422
        )  # the run without an id has no labels
        httpx.delete(f"{url}/run/a/labels", timeout=WAIT_S).raise_for_status()
        assert httpx.post(f"{url}/run/b{SLIME}", json=body, timeout=WAIT_S).status_code == 200
    assert counts == [{12}, {12}]
    assert matches == [12, 4]
    of_runs = Counter((line["run"], line["reward"]) for line in lines(tmp_path))
    assert of_runs == {("a", 0.93): 12, ("b", 0.63): 9, ("b", 0.93): 4}


class Recording(FakePolicy):
    """Records the prompt of each completion that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[tuple[str, int]] = []

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        for each in groups:
            self.prompts.append((self.codec.decode(each.prompt_ids).text, len(each.completions)))
        return super().certainties(groups, rules, version)


@pytest.mark.parametrize("prompts", [("", "page"), ("page", "")])
def test_an_empty_prompt_takes_no_other_groups_prompt(prompts: tuple[str, str]) -> None:
    """A group is in one request. Fields that would join parts of several are refused, in any order."""
    texts = dict(zip(prompts, (answer(rationale="one"), answer(rationale="other")), strict=True))
    parts = [group(text, id="g", prompt=prompt) for prompt, text in texts.items()]
    policy = Recording()
    with served(policy) as url:
        for part in parts:
            given = {"groups": [{**part, "group_id": "g", "group_size": 2}]}
            refused = httpx.post(f"{url}/score", json=given, timeout=WAIT_S).json()
            locations = [error["location"] for error in refused["errors"]]
            assert (refused["status"], locations) == (422, ["groups[0].group_id", "groups[0].group_size"])
        assert policy.prompts == []
        send_at_once(url, "/score", [{"groups": [part]} for part in parts])
        assert sorted(policy.prompts) == [("", 1), ("page", 1)]
        send_one_by_one(url, "/score", [{"groups": parts}])
        assert sorted(policy.prompts) == [("", 1), ("", 1), ("page", 1), ("page", 1)]
