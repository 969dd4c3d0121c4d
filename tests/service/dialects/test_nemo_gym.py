"""NeMo Gym's resources server, as NeMo Gym, verifiers and Axolotl use it."""

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from shopr1_service.core import CodecError
from shopr1_service.policy.fake import CharacterCodec, FakePolicy
from tests.support.http import (
    CLICK,
    SEARCH,
    TERMINATE,
    answer,
    group,
    metric,
    problem,
    running,
    score,
    served,
)
from tests.support.trainer_requests import (
    AIOHTTP,
    LOG_KEYS,
    MAX_TOKENS,
    TOO_LONG,
    VERIFY,
    axolotl,
    register,
    send,
    send_ok,
)

pytestmark = pytest.mark.anyio

PREFIX = "/dialects/nemo_gym"
TERMS = ["format", "action_type", "attribute", "value", "self_certainty"]


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[httpx.AsyncClient]:
    async with running(FakePolicy(26.0, max_sequence_tokens=MAX_TOKENS)) as client:
        yield client


def row(**fields: Any) -> dict[str, Any]:
    """A row of a data set, as an agent of NeMo Gym sends it to `/seed_session`."""
    params = {"input": [{"role": "user", "content": "page", "type": "message"}], "temperature": 1.0}
    return {"responses_create_params": params, "_ng_task_index": 3, "_ng_rollout_index": 1, **fields}


def response(*texts: str, **more: Any) -> dict[str, Any]:
    """A policy's response, as verifiers builds it from its trace; with token ids, as NeMo-RL has them."""
    content = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
    message = {"id": "msg_0", "type": "message", "role": "assistant", "status": "completed"}
    return {
        "id": "resp_0",
        "created_at": 1790000000.25,
        "model": "verifiers",
        "object": "response",
        "output": [{**message, "content": content, "prompt_token_ids": [1, 2], **more}] if texts else [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "status": "completed",
    }


def verify(*texts: str, **fields: Any) -> dict[str, Any]:
    return {**row(ground_truth=TERMINATE), "response": response(*texts or (answer(),)), **fields}


# --- verify -----------------------------------------------------------------------------------------


async def test_axolotls_request_byte_for_byte(service: httpx.AsyncClient) -> None:
    sent = (
        b'{"label": {"type": "terminate"}, "responses_create_params": {"input": [{"role": "user", "content": '
        b'"page"}]}, "response": {"id": "resp", "created_at": 0, "model": "axolotl", "object": "response", '
        b'"output": [{"id": "msg", "role": "assistant", "type": "message", "status": "completed", "content": '
        b'[{"type": "output_text", "text": "{\\"rationale\\": \\"abcd\\", \\"action\\": {\\"type\\": '
        b'\\"terminate\\"}}", "annotations": []}]}], "parallel_tool_calls": true, "tool_choice": "auto", '
        b'"tools": []}}'
    )
    assert sent == json.dumps(axolotl("page", answer(), label=TERMINATE)).encode()
    answered = await service.post(VERIFY, content=sent, headers=AIOHTTP)
    assert answered.status_code == 200
    assert answered.headers["Content-Type"] == "application/json"
    assert answered.json()["reward"] == 0.93


async def test_the_request_is_echoed_with_the_reward(service: httpx.AsyncClient) -> None:
    sent = verify(answer(CLICK), ground_truth=CLICK, agent_ref={"name": "shop"})
    answered = await send_ok(service, VERIFY, sent)
    assert {key: answered[key] for key in sent} == sent
    added = {key: value for key, value in answered.items() if key not in sent}
    assert list(added) == [
        *("reward", "reward_components", "mask_sample", "failure_kind", "failure_reason"),
        *LOG_KEYS,
    ]
    assert added["reward"] == 1001.13
    assert added["reward_components"] == dict(zip(TERMS, (0.5, 0.3, 0.2, 1000.0, 0.13), strict=True))
    assert (added["mask_sample"], added["failure_kind"], added["failure_reason"]) == (False, None, None)
    # Its metrics do not look into `reward_components`.
    assert [added[key] for key in LOG_KEYS[:5]] == list(added["reward_components"].values())


async def test_any_json_is_echoed(service: httpx.AsyncClient) -> None:
    odd = {"big": 10**30, "half": "\ud83d", "é": [None, 1.5, {"x": False}], "int": 1}
    sent = verify(**odd)
    answered = await send(service, VERIFY, sent)
    assert {key: answered.json()[key] for key in sent} == sent
    assert type(answered.json()["int"]) is int


@pytest.mark.parametrize(
    "completion", [answer(CLICK), answer(SEARCH, "why"), "nonsense", answer(rationale="")]
)
async def test_the_reward_is_that_of_score_and_the_sum_of_its_components(completion: str) -> None:
    chat = [{"role": "user", "content": "page"}]
    async with running(FakePolicy(3.7, 0.013)) as client:
        answered = await send_ok(client, VERIFY, verify(completion, ground_truth=SEARCH))
        scored = await score(client, group(completion, truth=SEARCH, prompt=chat))
    [expected] = scored["groups"][0]["rewards"]
    assert answered["reward"] == expected["reward"]
    assert answered["reward_components"] == expected["components"]
    # As NeMo-RL checks it.
    total = sum(answered["reward_components"].values())
    assert math.isclose(total, answered["reward"], rel_tol=1e-5, abs_tol=1e-6)


async def test_parts_of_the_output_are_one_text(service: httpx.AsyncClient) -> None:
    answered = await send_ok(service, VERIFY, verify(answer()[:20], answer()[20:]))
    assert answered["reward"] == 0.93


async def test_no_output_is_an_empty_completion(service: httpx.AsyncClient) -> None:
    answered = await send_ok(service, VERIFY, verify(response=response()))
    assert answered["reward"] == 0.0
    assert answered["shopr1/format_ok"] == 0.0
    assert answered["mask_sample"] is False  # the policy's own mistake, and a measurement


PROMPTS: list[tuple[dict[str, Any], str]] = [
    ({"input": "page"}, "user: page\n"),
    ({"input": [{"role": "user", "content": "page"}]}, "user: page\n"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "page"}]}]}, "user: page\n"),
    (
        {"input": [{"role": "user", "content": "page"}], "instructions": "Shop."},
        "system: Shop.\nuser: page\n",
    ),
    ({"input": "page", "instructions": "Shop."}, "system: Shop.\nuser: page\n"),
    ({"input": "page", "instructions": None, "tools": []}, "user: page\n"),
]


@pytest.mark.parametrize(("params", "templated"), PROMPTS)
async def test_the_prompt_is_the_chat_that_the_policy_saw(params: Any, templated: str) -> None:
    async with running() as client:
        await send_ok(client, VERIFY, verify(responses_create_params=params))
        tokens = await metric(client, "shopr1_engine_tokens_total")
    assert tokens == len(templated) + len(answer())


@pytest.mark.parametrize("name", ["ground_truth", "expected_answer", "label"])
@pytest.mark.parametrize("label", [CLICK, json.dumps(CLICK)])
async def test_the_ground_truth_is_a_field_of_the_row(
    service: httpx.AsyncClient, name: str, label: Any
) -> None:
    sent = {**row(), name: label, "response": response(answer(CLICK))}
    assert (await send_ok(service, VERIFY, sent))["reward"] == 1001.13


async def test_the_first_of_several_fields_counts(service: httpx.AsyncClient) -> None:
    # Only the first is a ground truth here; two that differ are refused, below.
    sent = verify(ground_truth=None, expected_answer=TERMINATE, label="ring")
    assert (await send_ok(service, VERIFY, sent))["reward"] == 0.93
    sent = verify(ground_truth=TERMINATE, expected_answer=json.dumps(TERMINATE), label={"row": 7})
    assert (await send_ok(service, VERIFY, sent))["reward"] == 0.93


async def test_a_row_without_one_is_looked_up_by_its_messages() -> None:
    sent = {**row(), "response": response(answer())}
    async with running(FakePolicy(26.0)) as client:
        await register(client, ("page", CLICK))
        refused = problem(await send(client, VERIFY, sent), 422, "invalid_request")
        await register(client, ([{"role": "user", "content": "page"}], TERMINATE))
        answered = await send_ok(client, VERIFY, sent)
    assert [error["location"] for error in refused["errors"]] == ["ground_truth"]
    assert answered["reward"] == 0.93


def item(**fields: Any) -> dict[str, Any]:
    return {"output": [{"type": "message", "content": []} | fields]}


INPUT, OUTPUT = "responses_create_params.input", "response.output"
WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"responses_create_params": None}, ["responses_create_params"]),
    ({"responses_create_params": {}}, [INPUT]),
    ({"responses_create_params": {"input": 1}}, [INPUT]),
    ({"responses_create_params": {"input": [{"role": "user"}]}}, [f"{INPUT}[0].content"]),
    ({"responses_create_params": {"input": [{"content": "x"}]}}, [f"{INPUT}[0].role"]),
    (
        {"responses_create_params": {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}},
        [f"{INPUT}[0].content[0].type", f"{INPUT}[0].content[0].text"],
    ),
    (
        {"responses_create_params": {"input": "x", "tools": [{"name": "f"}]}},
        ["responses_create_params.tools"],
    ),
    ({"response": None}, ["response"]),
    ({"response": {}}, [OUTPUT]),
    ({"response": item(type="reasoning")}, [f"{OUTPUT}[0].type"]),
    ({"response": item(content="x")}, [f"{OUTPUT}[0].content"]),
    ({"response": item(content=[{"type": "refusal", "text": ""}])}, [f"{OUTPUT}[0].content[0].type"]),
    ({"response": {"output": item()["output"] * 2}}, [OUTPUT]),
    ({"ground_truth": 7}, ["ground_truth"]),
    ({"ground_truth": {"type": "click"}}, ["ground_truth.name"]),
    ({"ground_truth": None, "label": "click"}, ["label"]),
    ({"ground_truth": TERMINATE, "label": CLICK}, ["label"]),
    (
        {"ground_truth": TERMINATE, "expected_answer": json.dumps(CLICK), "label": CLICK},
        ["expected_answer", "label"],
    ),
]


@pytest.mark.parametrize(("fields", "locations"), WRONG)
async def test_bad_fields_are_named(service: httpx.AsyncClient, fields: Any, locations: list[str]) -> None:
    refused = problem(await send(service, VERIFY, verify(**fields)), 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == locations


async def test_messages_that_the_template_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> list[int]:
        raise CodecError("no system role")

    monkeypatch.setattr(CharacterCodec, "encode_chat", refuse)
    async with running() as client:
        refused = problem(await send(client, VERIFY, verify()), 422, "invalid_request")
    assert refused["errors"] == [{"location": INPUT, "message": "no system role"}]


# --- the policy's own prompt --------------------------------------------------------------------------


def ids(text: str) -> list[int]:
    return list(map(ord, text))


async def num_tokens(sent: Any) -> float:
    async with running() as client:
        await send_ok(client, VERIFY, sent)
        return await metric(client, "shopr1_engine_tokens_total")


async def test_arguments_of_the_template_are_the_rows() -> None:
    params = {"input": "page", "metadata": {"chat_template_kwargs": '{"enable_thinking": false}'}}
    expected = '{"enable_thinking": false}\nuser: page\n'
    assert await num_tokens(verify(responses_create_params=params)) == len(expected) + len(answer())


async def test_token_ids_are_used_instead_of_text() -> None:
    sampled = answer(rationale="abc")
    own = {"prompt_token_ids": ids("the policy's own"), "generation_token_ids": ids(sampled)}
    sent = verify(response=response("something else", **own))
    assert await num_tokens(sent) == len("the policy's own") + len(sampled)
    sent["responses_create_params"]["tools"] = [{"type": "function", "name": "f"}]
    sent["response"]["output"].insert(0, {"id": "rs_1", "type": "reasoning", "summary": []})
    assert await num_tokens(sent) == len("the policy's own") + len(sampled)


async def test_the_label_of_a_prompt_with_ids_is_registered_by_its_messages(
    service: httpx.AsyncClient,
) -> None:
    own = {"prompt_token_ids": ids("x"), "generation_token_ids": ids(answer(CLICK))}
    await register(service, ([{"role": "user", "content": "page"}], CLICK))
    answered = await send_ok(service, VERIFY, verify(response=response("", **own), ground_truth=None))
    assert answered["reward"] == 1001.13


async def test_bad_token_ids_are_named(service: httpx.AsyncClient) -> None:
    for own, location in (
        ({"prompt_token_ids": [1, 0x110000], "generation_token_ids": [1]}, "prompt_token_ids[1]"),
        ({"prompt_token_ids": [1], "generation_token_ids": [1, 2, 0x110000]}, "generation_token_ids[2]"),
        ({"prompt_token_ids": [-1], "generation_token_ids": [1]}, "prompt_token_ids[0]"),
    ):
        refused = problem(
            await send(service, VERIFY, verify(response=response("", **own))), 422, "invalid_request"
        )
        assert [error["location"] for error in refused["errors"]] == [f"response.output[0].{location}"]


async def test_a_chat_that_ends_with_the_assistants_message_is_refused(service: httpx.AsyncClient) -> None:
    chat = [{"role": "user", "content": "page"}, {"role": "assistant", "content": "Sure"}]
    refused = problem(
        await send(service, VERIFY, verify(responses_create_params={"input": chat})), 422, "invalid_request"
    )
    assert [error["location"] for error in refused["errors"]] == [INPUT]
    metadata = {"extra_body": '{"continue_final_message": true}'}
    sent = verify(responses_create_params={"input": chat, "metadata": metadata})
    assert await num_tokens(sent) == len("user: page\nassistant: Sure") + len(answer())


# --- unscorable rollouts ----------------------------------------------------------------------------


async def test_unscorable_is_marked_and_masked(service: httpx.AsyncClient) -> None:
    before = await metric(service, "shopr1_fallback_rewards_total", dialect="nemo_gym")
    answered = await send_ok(service, VERIFY, verify(TOO_LONG, instance_config={"id": 7}))
    scored = await send_ok(service, VERIFY, verify())
    assert answered["reward"] == 0.0
    assert answered["_ng_failure_class"] == "unscorable"
    assert answered["failure_reason"].startswith("sequence_too_long: ")
    assert answered["failure_kind"] == "verifier_error"
    assert answered["mask_sample"] is True
    assert answered["instance_config"] == {"id": 7, "mask_sample": True}
    assert answered["shopr1/unscorable"] == 1.0
    assert answered["reward_components"] == dict.fromkeys(TERMS, 0.0)
    assert answered.keys() - scored.keys() == {"_ng_failure_class", "instance_config"}
    after = await metric(service, "shopr1_fallback_rewards_total", dialect="nemo_gym")
    assert after - before == 1


@pytest.mark.parametrize("config", [None, "x", []])
async def test_an_odd_instance_config_is_replaced(service: httpx.AsyncClient, config: Any) -> None:
    answered = await send_ok(service, VERIFY, verify(TOO_LONG, instance_config=config))
    assert answered["instance_config"] == {"mask_sample": True}


async def test_unscorable_as_an_error() -> None:
    policy = FakePolicy(max_sequence_tokens=MAX_TOKENS)
    async with running(policy, nemo_gym_unscorable="error") as client:
        refused = problem(await send(client, VERIFY, verify(TOO_LONG)), 422, "unscorable")
        assert await metric(client, "shopr1_fallback_rewards_total") == 0
    assert [error["location"] for error in refused["errors"]] == ["response.output"]


async def test_an_earlier_verdict_does_not_stay(service: httpx.AsyncClient) -> None:
    """A rollout that is verified again brings its earlier answer along."""
    failed = await send_ok(service, VERIFY, verify(TOO_LONG))
    again = await send_ok(service, VERIFY, failed | {"response": response(answer())})
    assert "_ng_failure_class" not in again
    assert (again["reward"], again["mask_sample"], again["failure_reason"]) == (0.93, False, None)
    assert again["shopr1/unscorable"] == 0.0


# --- the other routes -------------------------------------------------------------------------------


def test_a_rollout_of_verifiers() -> None:
    """It seeds, verifies, makes metrics of all numbers, and drops what it has echoed."""
    with served(FakePolicy(26.0)) as url, httpx.Client(timeout=60) as client:
        seeded = client.post(f"{url}{PREFIX}/seed_session", json=row(ground_truth=TERMINATE))
        seeded.raise_for_status()
        assert seeded.json().get("mcp") is None
        verified = client.post(f"{url}{VERIFY}", json=verify())
        verified.raise_for_status()
    result = verified.json()
    for key in ("responses_create_params", "response", "reward"):
        result.pop(key)
    metrics = {key: float(value) for key, value in result.items() if isinstance(value, bool | int | float)}
    assert metrics.keys() >= {"mask_sample", *LOG_KEYS}
    assert all(map(math.isfinite, metrics.values()))


async def test_seed_session_takes_any_row(service: httpx.AsyncClient) -> None:
    assert await send_ok(service, f"{PREFIX}/seed_session", {}) == {}
    assert await send_ok(service, f"{PREFIX}/seed_session", {"task": {"deep": [1, None]}}) == {}
    refused = problem(await send(service, f"{PREFIX}/seed_session", []), 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == ["body"]


async def test_reverify_mode(service: httpx.AsyncClient) -> None:
    assert (await service.get(f"{PREFIX}/reverify_mode")).json() == "stateless"


# --- aggregate_metrics ------------------------------------------------------------------------------


async def aggregated(service: httpx.AsyncClient, *rollouts: dict[str, Any]) -> Any:
    return await send_ok(service, f"{PREFIX}/aggregate_metrics", {"verify_responses": rollouts})


async def test_aggregate_metrics(service: httpx.AsyncClient) -> None:
    answered = await aggregated(
        service,
        {"_ng_task_index": 9, "_ng_rollout_index": 0, "reward": 2.0, "ok": True, "name": "x"},
        {"_ng_task_index": 2, "_ng_rollout_index": 0, "reward": 1, "response": {"usage": {"tokens": 5}}},
        {"_ng_task_index": 9, "_ng_rollout_index": 1, "reward": 6.0, "ok": False, "response": None},
    )
    # 1, 2, 6: mean 3, squares of the deviations 4 + 1 + 9 = 14, over n − 1 = 2.
    expected = {"mean": 3.0, "max": 6.0, "min": 1.0, "median": 2.0, "std": math.sqrt(7)}
    everything = answered["agent_metrics"]
    assert {name: everything[f"{name}/reward"] for name in expected} == pytest.approx(expected)
    assert (everything["mean/ok"], everything["mean/tokens"]) == (0.5, 5.0)
    assert {name.partition("/")[2] for name in everything} == {"reward", "ok", "tokens"}
    assert answered["key_metrics"] == {"mean/reward": 3.0, "mean/ok": 0.5, "mean/tokens": 5.0}
    second, ninth = answered["group_level_metrics"]
    assert (second["_ng_task_index"], second["mean/reward"], second["std/reward"]) == (2, 1.0, 0.0)
    assert (ninth["_ng_task_index"], ninth["mean/reward"]) == (9, 4.0)
    assert ninth["std/reward"] == pytest.approx(math.sqrt(8))


async def test_aggregate_metrics_of_answers_of_verify(service: httpx.AsyncClient) -> None:
    scored = await send_ok(service, VERIFY, verify())
    failed = await send_ok(service, VERIFY, verify(TOO_LONG))
    answered = await aggregated(service, scored, failed)
    assert answered["agent_metrics"]["mean/reward"] == 0.93
    assert answered["agent_metrics"]["mean/mask_sample"] == 0.0
    assert answered["agent_metrics"]["max/shopr1/unscorable"] == 0.0


@pytest.mark.parametrize("rollouts", [[], [{"_ng_failure_class": "unscorable", "reward": 0.0}]])
async def test_aggregate_metrics_of_nothing(service: httpx.AsyncClient, rollouts: Any) -> None:
    answered = await aggregated(service, *rollouts)
    assert answered == {"group_level_metrics": [], "agent_metrics": {}, "key_metrics": {}}


async def test_aggregate_metrics_omit_values_that_are_not_finite(service: httpx.AsyncClient) -> None:
    odd = (
        b'{"verify_responses": [{"a": NaN, "b": Infinity, "c": 1'
        + b"0" * 400
        + b', "d": 1, "_ng_task_index": "x"}]}'
    )
    answered = await send_ok(service, f"{PREFIX}/aggregate_metrics", odd)
    assert answered["key_metrics"] == {"mean/d": 1.0}
    assert [each["_ng_task_index"] for each in answered["group_level_metrics"]] == [0]


async def test_aggregate_metrics_of_invalid_rollouts(service: httpx.AsyncClient) -> None:
    sent = {"verify_responses": [{}, 1]}
    refused = problem(await send(service, f"{PREFIX}/aggregate_metrics", sent), 422, "invalid_request")
    assert [error["location"] for error in refused["errors"]] == ["verify_responses[1]"]
