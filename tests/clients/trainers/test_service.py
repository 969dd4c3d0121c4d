"""The shims' common part, against a service behind a socket: errors name rollouts, dates are not text."""

import asyncio
import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from shopr1_client.errors import InvalidRequestError
from shopr1_client.grouping import Rollout
from shopr1_client.trainers.service import Service
from shopr1_client.wire import Message, Reward
from shopr1_client.wire_prompt import PromptOptions
from shopr1_service.policy.fake import CharacterCodec, FakePolicy
from tests.support.http import CLICK, SEARCH, TERMINATE, answer, served


def score_sync(service: Service, rollouts: Sequence[Rollout]) -> list[Reward]:
    return service.score_sync(rollouts)


def score_async(service: Service, rollouts: Sequence[Rollout]) -> list[Reward]:
    return asyncio.run(service.score(rollouts))


Score = Callable[[Service, Sequence[Rollout]], list[Reward]]
each = pytest.mark.parametrize("score", [score_sync, score_async], ids=["sync", "async"])


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with served(FakePolicy(26.0)) as url:
        yield Service.find(url)


def rollout(truth: Any, completion: str = answer(), prompt: str = "page") -> Rollout:
    return Rollout(prompt=prompt, completion=completion, ground_truth=truth)


@each
def test_errors_name_the_rollout_and_its_field(service: Service, score: Score) -> None:
    truths = [TERMINATE, CLICK, TERMINATE, {"type": "click", "name": None}]
    with pytest.raises(InvalidRequestError) as caught:
        score(service, [rollout(truth) for truth in truths])
    [error] = caught.value.errors
    assert error["location"] == "rollouts[3].ground_truth.name"
    assert str(caught.value) == f"{error['location']}: {error['message']}"


@each
@pytest.mark.parametrize("day", [datetime.datetime(2026, 5, 1), datetime.date(2026, 5, 1)])
def test_a_date_where_text_is_needed_is_refused(service: Service, score: Score, day: Any) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"^rollouts\[1\]\.ground_truth\.text: .*2026-05-01"
    ) as caught:
        score(service, [rollout(TERMINATE), rollout(SEARCH | {"text": day})])
    assert type(day).__name__ in str(caught.value)


@each
def test_other_values_of_a_data_set_do_not_matter(service: Service, score: Score) -> None:
    """Rows of a data set have all keys of all rows, and more about an action than its attributes."""
    more = {"text": None, "name": None, "time": datetime.datetime(2026, 5, 1), "score": float("nan")}
    truths = [TERMINATE, {**more, **TERMINATE}, {**more, **CLICK}]
    completions = [answer(), answer(), answer(CLICK)]
    rewards = score(service, [rollout(*pair) for pair in zip(truths, completions, strict=True)])
    assert [reward.reward for reward in rewards] == [0.93, 0.93, 1001.13]


@each
def test_each_kind_of_warning_is_logged_once(
    service: Service, score: Score, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shopr1_client.trainers.service._logged", set())
    caplog.set_level("WARNING", "shopr1_client.trainers.service")
    for _ in range(2):
        score(service, [rollout(TERMINATE, answer() + "<special>", prompt) for prompt in ("a", "b")])
    assert [record.getMessage() for record in caplog.records if record.name.endswith("service")] == [
        "the service doubts a prompt or an end of turn: "
        "1 of 1 completions are invalid only because they end with '<special>'"
    ]


@each
def test_arguments_of_the_environment_are_sent(score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[int]] = []
    encode = CharacterCodec.encode_chat

    def kept(codec: CharacterCodec, *chat: Any) -> list[int]:
        sent.append(encode(codec, *chat))
        return sent[-1]

    monkeypatch.setattr(CharacterCodec, "encode_chat", kept)
    monkeypatch.setenv("SHOPR1_CLIENT_CHAT_TEMPLATE_KWARGS", '{"x": 1, "y": 1}')
    own = Rollout(
        prompt=[Message(role="user", content="page")],
        completion=answer(),
        ground_truth=TERMINATE,
        options=PromptOptions(chat_template_kwargs={"y": 2}),
    )
    with served(FakePolicy(26.0)) as url:
        score(Service.find(url), [own])
    assert ["".join(map(chr, ids)) for ids in sent] == ['{"x": 1, "y": 2}\nuser: page\n']
