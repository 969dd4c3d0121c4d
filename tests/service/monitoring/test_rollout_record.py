"""Lines of the rollout log."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from shopr1_rewards import load_recipe
from shopr1_service.policy.fake import FakePolicy
from tests.support.http import CLICK, TERMINATE, answer, group, post, running, score
from tests.support.rollout_files import files, lines

pytestmark = pytest.mark.anyio

PROMPT, RATIONALE = "a secret page", "a secret thought"


async def test_a_line_for_each_rollout(tmp_path: Path) -> None:
    begin = datetime.now(UTC)
    async with running(rollout_log=tmp_path) as client:
        first = group(answer(CLICK), "{", truth=CLICK, id="g1")
        other = group(answer(CLICK), truth=json.dumps(TERMINATE))
        headers = {"X-Request-ID": "r1", "X-Run-ID": "grpo-7"}
        answered = (await post(client, {"groups": [first, other]}, **headers)).json()
    end = datetime.now(UTC)
    right, broken, wrong = lines(tmp_path)
    assert begin <= datetime.fromisoformat(right.pop("time")) <= end
    details = answered["groups"][0]["rewards"][0]["details"]
    assert right == {
        "request_id": "r1",
        "run": "grpo-7",
        "recipe": "shop_r1",
        "recipe_digest": load_recipe("shop_r1").digest,
        "policy_version": "0",
        "policy_number": 0,
        "adapter": None,
        "group": 0,
        "group_id": "g1",
        "num_rollouts": 2,
        "ground_truth": CLICK,
        "rollout": 0,
        "predicted_action": CLICK,
        # 0.5 + 0.3 + 0.2 + 1000 + 0.005 · 26
        "reward": pytest.approx(1001.13),
        "status": "scored",
        "reason": None,
        "message": None,
        "components": {
            "format": 0.5,
            "action_type": 0.3,
            "attribute": 0.2,
            "value": 1000.0,
            "self_certainty": pytest.approx(0.13),
        },
        "details": {
            key: value
            for key, value in details.items()
            if key not in ("tokens", "completion_token_ids", "predicted_action")
        },
    }
    assert (broken["group"], broken["rollout"], broken["reward"]) == (0, 1, 0)
    assert (broken["predicted_action"], broken["details"]["format_error"]) == (None, "invalid_json")
    assert (wrong["group"], wrong["rollout"], wrong["group_id"]) == (1, 0, None)
    assert (wrong["ground_truth"], wrong["predicted_action"]) == (TERMINATE, CLICK)
    assert wrong["reward"] == pytest.approx(0.63)  # 0.5 + 0.005 · 26


async def test_unscorable_rollouts_have_their_reason(tmp_path: Path) -> None:
    async with running(FakePolicy(max_sequence_tokens=10), rollout_log=tmp_path) as client:
        await score(client, group(answer()))
    [line] = lines(tmp_path)
    assert (line["reward"], line["status"], line["reason"]) == (None, "unscorable", "sequence_too_long")
    assert line["components"]["self_certainty"] is None


async def test_rejected_requests_are_not_logged(tmp_path: Path) -> None:
    async with running(rollout_log=tmp_path) as client:
        assert (await post(client, {"groups": [group(answer(), truth={"type": "jump"})]})).status_code == 422
    assert files(tmp_path) == []  # a service that scores nothing leaves nothing


async def test_groups_are_counted_from_request_to_request(tmp_path: Path) -> None:
    async with running(rollout_log=tmp_path) as client:
        # Ids are the clients': these two say that they are the same request.
        for prompt in ("one", "other"):
            groups = [group(answer(), prompt=prompt), group(answer(), prompt=prompt + "!")]
            await post(client, {"groups": groups}, **{"X-Request-ID": "r1"})
    assert [line["group"] for line in lines(tmp_path)] == [0, 1, 0, 1]


def asked(prompt: Any) -> dict[str, Any]:
    return group(answer(TERMINATE, RATIONALE), {"text": "{"}, {"token_ids": [123, 125]}, prompt=prompt)


async def test_no_text_by_default(tmp_path: Path) -> None:
    async with running(rollout_log=tmp_path) as client:
        await score(client, asked(PROMPT), include=["tokens", "token_ids"])
    [file] = files(tmp_path)
    assert "secret" not in file.read_text()
    # The tokenizer turns ids into text.
    assert "token_ids" not in file.read_text()
    assert len(lines(tmp_path)) == 3


@pytest.mark.parametrize(
    "prompt", [PROMPT, [{"role": "user", "content": PROMPT}], {"token_ids": list(map(ord, PROMPT))}]
)
async def test_text_if_the_setting_enables_it(tmp_path: Path, prompt: Any) -> None:
    async with running(rollout_log=tmp_path, rollout_log_text=True) as client:
        await score(client, asked(prompt), include=["token_ids"])
    logged = lines(tmp_path)
    assert [line["prompt"] for line in logged] == [prompt, None, None]
    # Ids of completions are decoded: 123 and 125 are the braces.
    assert [line["completion"] for line in logged] == [answer(TERMINATE, RATIONALE), "{", "{}"]


async def test_half_surrogate_pairs_can_be_read_again(tmp_path: Path) -> None:
    async with running(rollout_log=tmp_path, rollout_log_text=True) as client:
        await score(client, group("a\ud800b", truth=CLICK, prompt=[{"role": "user", "content": "é"}]))
    [line] = lines(tmp_path)
    assert (line["completion"], line["prompt"][0]["content"]) == ("a?b", "é")


async def test_equal_samples_have_a_line_each_and_tries_of_a_request_one(tmp_path: Path) -> None:
    async with running(rollout_log=tmp_path) as client:
        for request_id in ("a", "b", "a", "c", "b"):
            await post(client, {"groups": [group(answer())]}, **{"X-Request-ID": request_id})
    assert [line["request_id"] for line in lines(tmp_path)] == ["a", "b", "c"]
