"""`openapi.yaml` is the application's document; examples and real responses match its schemas."""

import json
from collections.abc import AsyncIterator, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate

from shopr1_client.errors import PROBLEM_MEDIA_TYPE, PROBLEMS
from shopr1_client.wire import ScoreRequest
from shopr1_service.http.examples import SCORE_REQUEST, SCORE_RESPONSE
from shopr1_service.http.openapi import to_yaml
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app
from shopr1_service.settings import Settings
from tests.support.http import answer, group, post, running

pytestmark = pytest.mark.anyio

FILE = Path(__file__).parents[2] / "openapi.yaml"
DOCUMENT: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))
PROBLEM_OF_CODE = {problem.code: problem for problem in PROBLEMS}
STATUSES = {str(problem.status) for problem in PROBLEMS}

OPERATIONS = {
    "POST /score": "score",
    "GET /info": "info",
    "GET /recipes": "listRecipes",
    "GET /recipes/{name}": "getRecipe",
    "GET /health/live": "live",
    "GET /health/ready": "ready",
    "GET /metrics": "metrics",
    "POST /dialects/openrlhf/get_reward": "openrlhfGetReward",
    "POST /dialects/slime/reward": "slimeReward",
    "POST /dialects/llama_factory/v1/score/evaluation": "llamaFactoryScoreEvaluation",
    "POST /dialects/nemo_gym/seed_session": "nemoGymSeedSession",
    "POST /dialects/nemo_gym/verify": "nemoGymVerify",
    "POST /dialects/nemo_gym/aggregate_metrics": "nemoGymAggregateMetrics",
    "GET /dialects/nemo_gym/reverify_mode": "nemoGymReverifyMode",
    "PUT /labels": "putLabels",
    "GET /labels": "getLabels",
    "DELETE /labels": "deleteLabels",
    "GET /policy": "policy",
    "POST /policy/update": "updatePolicy",
    "PUT /policy/weights": "uploadWeights",
    "POST /policy/transfer": "transferWeights",
    "POST /policy/adapters": "loadAdapter",
    "PUT /policy/adapters/{name}": "uploadAdapter",
    "DELETE /policy/adapters/{name}": "unloadAdapter",
    "POST /update_weights_from_disk": "sglangUpdateWeights",
    "GET /model_info": "sglangModelInfo",
    "POST /pause_generation": "sglangPause",
    "POST /continue_generation": "sglangContinue",
    "POST /flush_cache": "sglangFlushCache",
    "GET /flush_cache": "sglangFlushCacheByGet",
    "POST /load_lora_adapter": "sglangLoadLora",
    "POST /unload_lora_adapter": "sglangUnloadLora",
    "POST /v1/load_lora_adapter": "vllmLoadLora",
    "POST /v1/unload_lora_adapter": "vllmUnloadLora",
}
SCORING_FOR_TRAINERS = [
    "/dialects/openrlhf/get_reward",
    "/dialects/slime/reward",
    "/dialects/llama_factory/v1/score/evaluation",
    "/dialects/nemo_gym/verify",
]


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def contents() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every body of the document: name, media type, and content."""
    for name, operation in operations():
        for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
            yield name, media_type, content
        for status, response in operation["responses"].items():
            for media_type, content in response["content"].items():
                yield f"{name} {status}", media_type, content


def examples() -> Iterator[tuple[str, dict[str, Any], Any]]:
    for name, _, content in contents():
        for label, named in content.get("examples", {}).items():
            yield f"{name} {label}", content["schema"], named["value"]
        if "example" in content:
            yield name, content["schema"], content["example"]


def errors(schema: dict[str, Any], value: Any) -> list[str]:
    """Violations of a schema of the document by a value."""
    validator = OAS31Validator({**schema, "components": DOCUMENT["components"]})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


each_operation = pytest.mark.parametrize(
    "operation", [pytest.param(operation, id=name) for name, operation in operations()]
)
each_example = pytest.mark.parametrize(
    ("schema", "value"), [pytest.param(schema, value, id=name) for name, schema, value in examples()]
)


# --- the document -----------------------------------------------------------------------------------


def test_the_file_equals_the_application_document() -> None:
    document = create_app(Settings(), LocalEngine.opener(FakePolicy)).openapi()
    assert document == DOCUMENT
    assert to_yaml(document) == FILE.read_text("utf-8"), "run `make openapi`"


def test_settings_do_not_change_the_document() -> None:
    settings = Settings(port=1, max_groups=2, max_body_bytes=3, policy="x", log_level="debug")
    assert create_app(settings, LocalEngine.opener(FakePolicy)).openapi() == DOCUMENT


async def test_the_document_is_served() -> None:
    async with running() as client:
        assert (await client.get("/openapi.json")).json() == DOCUMENT


def test_the_document_is_valid_openapi() -> None:
    validate(DOCUMENT)


def test_operation_ids() -> None:
    assert {name: operation["operationId"] for name, operation in operations()} == OPERATIONS


@each_operation
def test_an_operation_is_described(operation: dict[str, Any]) -> None:
    assert operation["summary"]
    assert operation["description"]
    assert operation["tags"]
    assert set(operation["tags"]) <= {tag["name"] for tag in DOCUMENT["tags"]}


def test_every_body_has_an_example_and_a_schema() -> None:
    bodies = list(contents())
    assert len(bodies) > 20
    for name, media_type, content in bodies:
        assert content["schema"], name
        if media_type == "application/octet-stream":  # binary: no example
            continue
        assert "example" in content or content.get("examples"), name


def problem_examples(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The problems of one status. If there are several, each example is named by its code."""
    if "example" in content:
        return [content["example"]]
    assert all(named["value"]["code"] == code for code, named in content["examples"].items())
    return [named["value"] for named in content["examples"].values()]


@each_operation
def test_problems_have_the_status_of_their_class(operation: dict[str, Any]) -> None:
    problems = {status: r for status, r in operation["responses"].items() if status != "200"}
    assert "500" in problems
    for status, response in problems.items():
        bodies = problem_examples(response["content"][PROBLEM_MEDIA_TYPE])
        for body in bodies:
            expected = PROBLEM_OF_CODE[body["code"]]
            assert (body["status"], body["title"]) == (expected.status, expected.title)
            assert body["status"] == int(status)
        assert response["description"] == ", or: ".join(body["title"] for body in bodies)
        assert ("Retry-After" in response.get("headers", {})) is (status in ("409", "429", "503"))


def test_every_problem_of_scoring_is_documented() -> None:
    documented = set(DOCUMENT["paths"]["/score"]["post"]["responses"])
    # Not possible here: unknown paths and methods, and the storage of weights.
    assert documented == {"200", *STATUSES} - {"404", "405", "507"}


@pytest.mark.parametrize("path", SCORING_FOR_TRAINERS)
def test_every_problem_of_a_trainers_route_is_documented(path: str) -> None:
    responses = DOCUMENT["paths"][path]["post"]["responses"]
    # Not possible here either: a demanded policy version.
    assert set(responses) == {"200", *STATUSES} - {"404", "405", "409", "507"}
    bodies = problem_examples(responses["422"]["content"][PROBLEM_MEDIA_TYPE])
    assert [body["code"] for body in bodies] == ["invalid_request", "unscorable"]


def test_every_schema_is_used() -> None:
    text = json.dumps(DOCUMENT)
    unused = [name for name in DOCUMENT["components"]["schemas"] if f'schemas/{name}"' not in text]
    assert unused == []


# --- its examples -----------------------------------------------------------------------------------


@each_example
def test_examples_match_their_schemas(schema: dict[str, Any], value: Any) -> None:
    assert errors(schema, value) == []


def test_schemas_reject_invalid_values() -> None:
    """The test above relies on this."""
    schema = {"$ref": "#/components/schemas/ScoreResponse"}
    assert errors(schema, SCORE_RESPONSE) == []
    wrong = deepcopy(SCORE_RESPONSE)
    wrong["groups"][0]["rewards"][0]["status"] = "maybe"
    del wrong["request_id"]
    assert len(errors(schema, wrong)) == 2


def request_examples() -> list[Any]:
    content = DOCUMENT["paths"]["/score"]["post"]["requestBody"]["content"]["application/json"]
    return [pytest.param(named["value"], id=name) for name, named in content["examples"].items()]


@pytest.mark.parametrize("request_", request_examples())
async def test_example_requests_are_scored(request_: Any) -> None:
    assert ScoreRequest.model_validate(request_).groups
    async with running() as client:
        response = await post(client, request_)
    assert response.status_code == 200
    assert errors({"$ref": "#/components/schemas/ScoreResponse"}, response.json()) == []


async def test_the_example_response_is_the_response_to_the_example_request() -> None:
    async with running(FakePolicy(26.0)) as client:
        answered = (await post(client, SCORE_REQUEST)).json()
    of_the_run = ("request_id", "policy")
    assert {k: v for k, v in answered.items() if k not in of_the_run} == {
        k: v for k, v in SCORE_RESPONSE.items() if k not in of_the_run
    }


def test_the_documented_response_is_the_tested_one() -> None:
    responses = DOCUMENT["paths"]["/score"]["post"]["responses"]
    assert responses["200"]["content"]["application/json"]["example"] == SCORE_RESPONSE


# The order matters: LLaMA-Factory needs the label that the first request registers.
OF_TRAINERS = [name for name in OPERATIONS if "/dialects/" in name]
CALLS = ["PUT /labels", "GET /labels", *OF_TRAINERS, "DELETE /labels"]


async def test_trainers_examples_get_the_documented_responses() -> None:
    policy = FakePolicy(26.0)
    policy.codec.end_tokens = ("<|im_end|>",)
    async with running(policy) as client:
        for name in CALLS:
            method, path = name.split()
            operation = DOCUMENT["paths"][path][method.lower()]
            documented = operation["responses"]["200"]["content"]["application/json"]
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            requests = [named["value"] for named in content.get("examples", {}).values()] or [None]
            answers = [await client.request(method, path, json=body) for body in requests]
            assert [answer.status_code for answer in answers] == [200] * len(requests), name
            assert all(errors(documented["schema"], answer.json()) == [] for answer in answers), name
            # The documented response belongs to the first request; ids differ between runs.
            first, example = answers[0].json(), documented["example"]
            if path == "/dialects/llama_factory/v1/score/evaluation":
                assert first.pop("id").startswith("scoreval-")
                example = {key: value for key, value in example.items() if key != "id"}
            assert first == example, name


# --- real responses -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[httpx.AsyncClient]:
    async with running(FakePolicy(max_sequence_tokens=30), max_groups=5) as client:
        yield client


def documented(path: str, method: str, response: httpx.Response) -> dict[str, Any]:
    """The documented schema of this response."""
    content = DOCUMENT["paths"][path][method]["responses"][str(response.status_code)]["content"]
    schema: dict[str, Any] = content[response.headers["Content-Type"].partition(";")[0]]["schema"]
    return schema


@pytest.mark.parametrize(
    ("path", "documented_path"),
    [
        ("/info", "/info"),
        ("/recipes", "/recipes"),
        ("/recipes/shop_r1", "/recipes/{name}"),
        ("/recipes/nope", "/recipes/{name}"),
        ("/health/live", "/health/live"),
        ("/health/ready", "/health/ready"),
    ],
)
async def test_responses_are_documented(service: httpx.AsyncClient, path: str, documented_path: str) -> None:
    response = await service.get(path)
    assert errors(documented(documented_path, "get", response), response.json()) == []


async def test_metrics_are_documented(service: httpx.AsyncClient) -> None:
    response = await service.get("/metrics")
    assert errors(documented("/metrics", "get", response), response.text) == []


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, {"groups": [group(answer(), "no", answer(rationale="x" * 40)), group()]}),
        (200, {"groups": [group(answer(), "no", id="é")], "include": ["tokens", "token_ids"]}),
        (400, b"{"),
        (409, {"groups": [], "policy_version": "1"}),
        (413, {"groups": [group()] * 6}),
        (422, {"groups": [group(truth={}), {}]}),
    ],
)
async def test_responses_of_scoring_are_documented(
    service: httpx.AsyncClient, status: int, body: Any
) -> None:
    response = await post(service, body)
    assert response.status_code == status
    assert errors(documented("/score", "post", response), response.json()) == []
