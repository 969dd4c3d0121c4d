"""vLLM 0.33: a live service answers requests for adapters as vLLM's own handlers do.

vLLM has no HTTP client for these routes; its only one (`HTTPVLLMWeightSyncClient`) announces weights that go
through NCCL or CUDA. So its handlers are asked the same, and its models read both answers. They are compiled
from the installed files, because importing vLLM needs CUDA.
"""

import ast
import asyncio
import importlib.util
from collections import defaultdict
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pydantic
import pytest
import requests

from tests.integration.trainers.adapters import save_adapter
from tests.integration.trainers.serving import serving

ADMIN_KEY = "vllm-0123456789abcdef"  # pragma: allowlist secret
LOG = SimpleNamespace(debug=print, info=print, warning=print, warning_once=print)


def compiled(path: str, names: set[str], **known: Any) -> dict[str, Any]:
    """Definitions of a file of vLLM's, at its top or in a class."""
    [root] = importlib.util.find_spec("vllm").submodule_search_locations  # type: ignore[union-attr, misc]
    file = Path(root) / path
    nodes: list[ast.stmt] = [
        node
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if (isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name in names)
        or (isinstance(node, ast.Assign) and {ast.unparse(target) for target in node.targets} & names)
    ]
    found = {"__name__": "vllm", "logger": LOG, "HTTPStatus": HTTPStatus, **vars(pydantic), **known}
    exec(compile(ast.Module(nodes, []), str(file), "exec"), found)
    return found


REQUESTS = compiled(
    "entrypoints/serve/lora/protocol.py", {"LoadLoRAAdapterRequest", "UnloadLoRAAdapterRequest"}
)
MODELS = compiled(
    "entrypoints/serve/engine/protocol.py",
    {"_REMOVED_GUIDED_FIELDS", "OpenAIBaseModel", "ErrorInfo", "ErrorResponse"},
    ClassVar=ClassVar,
)
ErrorResponse: Any = MODELS["ErrorResponse"]
ERRORS = compiled(
    "entrypoints/serve/exception_handling/error_response.py",
    {"create_error_response"},
    sanitize_message=str,
    **{name: MODELS[name] for name in ("ErrorInfo", "ErrorResponse")},
)
METHODS = compiled(
    "entrypoints/openai/models/serving.py",
    {
        *("load_lora_adapter", "unload_lora_adapter"),
        *("_check_load_lora_adapter_request", "_check_unload_lora_adapter_request"),
    },
    LoRARequest=SimpleNamespace,
    create_error_response=ERRORS["create_error_response"],
    ErrorResponse=ErrorResponse,
    **REQUESTS,
)


class Engine:
    """An engine that loads every adapter."""

    async def add_lora(self, request: Any) -> None:
        pass


class Handlers:
    """vLLM's handlers of adapters."""

    load = METHODS["load_lora_adapter"]
    unload = METHODS["unload_lora_adapter"]
    _check_load_lora_adapter_request = METHODS["_check_load_lora_adapter_request"]
    _check_unload_lora_adapter_request = METHODS["_check_unload_lora_adapter_request"]

    def __init__(self) -> None:
        self.engine_client = Engine()
        self.lora_requests: dict[str, Any] = {}
        self.lora_resolver_lock: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.lora_id_counter = SimpleNamespace(inc=lambda _: len(self.lora_requests) + 1)

    def is_base_model(self, name: str) -> bool:
        return False


class Both:
    """Sends a request of vLLM's to its own handlers and to the service."""

    def __init__(self, url: str) -> None:
        self._url, self._handlers = url, Handlers()

    def load(self, **fields: Any) -> tuple[Any, requests.Response]:
        return self._ask("load", REQUESTS["LoadLoRAAdapterRequest"](**fields))

    def unload(self, **fields: Any) -> tuple[Any, requests.Response]:
        return self._ask("unload", REQUESTS["UnloadLoRAAdapterRequest"](**fields))

    def _ask(self, action: str, request: Any) -> tuple[Any, requests.Response]:
        expected = asyncio.run(getattr(self._handlers, action)(request))
        body, url = request.model_dump(), f"{self._url}/v1/{action}_lora_adapter"
        return expected, requests.post(url, json=body, timeout=60)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("roots")


@pytest.fixture(scope="module")
def url(roots: Path) -> Iterator[str]:
    with serving(api_keys=f"admin:{ADMIN_KEY}", policy_roots=str(roots)) as service:
        yield f"{service.url}/key/{ADMIN_KEY}"


def test_adapters(url: str, roots: Path) -> None:
    both, path = Both(url), str(save_adapter(roots / "a"))
    for expected, answered in (
        both.load(lora_name="a", lora_path=path),
        both.load(lora_name="a", lora_path=path, load_inplace=True),
        both.unload(lora_name="a", lora_int_id=1),
    ):
        assert answered.status_code == 200, answered.text
        assert answered.text == expected


def test_failures(url: str, roots: Path) -> None:
    both, path = Both(url), str(save_adapter(roots / "b"))
    both.load(lora_name="b", lora_path=path)
    for expected, answered in (
        both.load(lora_name="b", lora_path=path),
        both.load(lora_name="", lora_path=path),
        both.load(lora_name="c", lora_path=""),
        both.unload(lora_name=""),
        both.unload(lora_name="c"),
    ):
        error = ErrorResponse.model_validate(answered.json()).error
        assert error.code == answered.status_code
        assert error.message
        if expected.error.code == 404:
            assert (error.code, error.type) == (404, expected.error.type)
        else:  # the service has a status of its own for requests that it refuses
            assert (expected.error.code, error.code) == (400, 422)
    assert both.unload(lora_name="b")[1].status_code == 200


def test_an_unknown_path(url: str) -> None:
    answered = requests.post(
        f"{url}/v1/load_lora_adapter", json={"lora_name": "d", "lora_path": "nowhere"}, timeout=60
    )
    error = ErrorResponse.model_validate(answered.json()).error
    assert (error.code, error.param) == (answered.status_code, "path")
