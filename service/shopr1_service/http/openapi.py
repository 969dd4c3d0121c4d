"""OpenAPI document, built from the application, so that it cannot drift from it."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import yaml
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from shopr1_client.errors import DeadlineExceededError
from shopr1_client.transport import IDEMPOTENCY_HEADER
from shopr1_client.wire import Problem
from shopr1_service.http.middleware.auth import OPEN_PATHS
from shopr1_service.http.middleware.run_id import RUN_HEADER
from shopr1_service.http.problem_responses import SCHEMA_REF
from shopr1_service.http.request_keys import IDEMPOTENCY_PATTERN

TAGS = [
    {"name": "score", "description": "The reward."},
    {"name": "trainers", "description": "The same by the protocols of trainers that send HTTP themselves."},
    {"name": "recipes", "description": "The numbers of the reward."},
    {"name": "policy", "description": "Versions of the policy, and updates of its weights."},
    {"name": "engines", "description": "The same by SGLang's and vLLM's routes."},
    {"name": "service", "description": "The running service."},
    {"name": "health", "description": "For supervisors and load balancers."},
]

SECURITY_SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "One of the service's API keys, where it has any. Health routes need none.",
    },
    "query": {
        "type": "apiKey",
        "in": "query",
        "name": "api_key",
        "description": "For clients that cannot send headers. `/key/<key>` before any path does the same.",
    },
}

LABELS_PATH = "/labels"

METRICS_CONTENT: dict[str, Any] = {
    "description": "Metrics in Prometheus text format.",
    "content": {
        "text/plain": {
            "schema": {"type": "string"},
            "example": 'shopr1_rollouts_total{run="grpo",recipe="shop_r1",status="scored",reason=""} 12.0\n',
        }
    },
}

RUN_PARAMETER: dict[str, Any] = {
    "name": RUN_HEADER,
    "in": "header",
    "required": False,
    "description": "The training run that the request belongs to: metrics, logs and labels distinguish runs. "
    "For clients that cannot send headers, `/run/<id>` before any path does the same.",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{0,64}$"},
    "example": "grpo-7",
}

KEY_PARAMETER: dict[str, Any] = {
    "name": IDEMPOTENCY_HEADER,
    "in": "header",
    "required": False,
    "description": "A key of this request, such as a UUID, the same at every try: its rollouts count once. "
    "Without it, an `X-Request-ID` of the client serves. Requests without either are different samples, even "
    "with the same content.",
    "schema": {"type": "string", "pattern": f"^{IDEMPOTENCY_PATTERN}$"},
    "example": "step-120-prompt-7-sample-3",
}


def build_document(app: FastAPI, answers: Mapping[str, Any]) -> dict[str, Any]:
    """The OpenAPI document of the application.

    Args:
        answers: an example response for each operation id.
    """
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=TAGS
    )
    document["servers"] = [{"url": "http://127.0.0.1:8000", "description": "The default of `shopr1 serve`."}]
    document["components"]["schemas"] |= _problem_schemas()
    document["components"]["securitySchemes"] = SECURITY_SCHEMES
    document["security"] = [{}, *({name: []} for name in SECURITY_SCHEMES)]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path.startswith(OPEN_PATHS):
                operation["security"] = []
            _drop_default_validation_error(operation)
            _add_example(operation, answers)
            _add_headers(path, operation)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document


def _problem_schemas() -> dict[str, Any]:
    schema = Problem.model_json_schema(ref_template=SCHEMA_REF)
    nested: dict[str, Any] = schema.pop("$defs")
    return {"Problem": schema, **nested}


def _drop_default_validation_error(operation: dict[str, Any]) -> None:
    """Drop FastAPI's own 422, which it documents for every parameter; ours is a problem."""
    if "application/json" in operation["responses"].get("422", {}).get("content", {}):
        del operation["responses"]["422"]


def _add_example(operation: dict[str, Any], answers: Mapping[str, Any]) -> None:
    # Not through FastAPI's `responses`, which would leave out nulls.
    example = answers.get(operation["operationId"])
    if example is not None:
        operation["responses"]["200"]["content"]["application/json"]["example"] = example


def _add_headers(path: str, operation: dict[str, Any]) -> None:
    """Add the headers of the routes that score, which are those that can be late, and of the label store."""
    is_scoring = str(DeadlineExceededError.status) in operation["responses"]
    added = [RUN_PARAMETER] if is_scoring or path == LABELS_PATH else []
    added += [KEY_PARAMETER] if is_scoring else []
    if added:
        operation.setdefault("parameters", []).extend(deepcopy(added))


def to_yaml(document: dict[str, Any]) -> str:
    """The document as `openapi.yaml`."""
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
