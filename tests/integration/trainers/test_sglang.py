"""SGLang 0.5.23: its own HTTP client updates weights and adapters of a live service.

The client's methods are compiled from the installed file, because importing it needs CUDA.
"""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import requests

from tests.integration.trainers.adapters import save_adapter
from tests.integration.trainers.live import sessions
from tests.integration.trainers.serving import serving

ADMIN_KEY = "sglang-0123456789abcdef"  # pragma: allowlist secret


def method(name: str) -> Any:
    """A method of SGLang's `HttpServerEngineAdapter`."""
    [root] = importlib.util.find_spec("sglang").submodule_search_locations  # type: ignore[union-attr, misc]
    file = Path(root) / "srt" / "entrypoints" / "http_server_engine.py"
    tree = ast.parse(file.read_text("utf-8"))
    [function] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    names: dict[str, Any] = {"requests": requests, "Optional": Optional, "ssl_verify_of": lambda _: True}
    exec(compile(ast.Module([function], []), str(file), "exec"), names)
    return names[name]


class Client:
    """SGLang's client of a running server."""

    def __init__(self, url: str) -> None:
        self.server_args = SimpleNamespace(url=lambda: url)

    _make_request = method("_make_request")
    flush_cache = method("flush_cache")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("roots")


@pytest.fixture(scope="module")
def url(roots: Path) -> Iterator[str]:
    with serving(api_keys=f"admin:{ADMIN_KEY}", policy_roots=str(roots)) as service:
        yield f"{service.url}/key/{ADMIN_KEY}"


def test_adapters(url: str, roots: Path) -> None:
    client, path = Client(url), str(save_adapter(roots / "a"))
    base = certainty(url)
    assert client._make_request("pause_generation", {"mode": "abort"})["status"] == "ok"
    loaded = client._make_request("load_lora_adapter", {"lora_name": "a", "lora_path": path, "pinned": False})
    assert loaded["success"] is True
    assert loaded["loaded_adapters"] == {"a": path}
    assert client._make_request("continue_generation")["status"] == "ok"
    assert certainty(url, adapter="a") != base
    unloaded = client._make_request("unload_lora_adapter", {"lora_name": "a"})
    assert (unloaded["success"], unloaded["loaded_adapters"]) == (True, {})
    assert certainty(url) == pytest.approx(base, abs=1e-6)


@pytest.mark.parametrize(
    ("endpoint", "payload"),
    [
        ("load_lora_adapter", {"lora_name": "b", "lora_path": "nowhere"}),
        ("unload_lora_adapter", {"lora_name": "b"}),
        ("update_weights_from_disk", {"model_path": "nowhere"}),
        ("update_weights_from_disk", {}),
    ],
)
def test_failures(url: str, endpoint: str, payload: dict[str, str]) -> None:
    with pytest.raises(requests.HTTPError) as caught:
        Client(url)._make_request(endpoint, payload)
    assert caught.value.response is not None
    body = caught.value.response.json()
    assert body["success"] is False
    assert body["message"] == body["error_message"] == body["detail"]


def test_flushing_the_cache(url: str) -> None:
    """SGLang answers with text, which its own client cannot decode; trainers read the status."""
    with pytest.raises(requests.exceptions.JSONDecodeError):
        Client(url).flush_cache()
    assert requests.get(f"{url}/flush_cache", timeout=60).text.startswith("Cache flushed.\n")


def certainty(url: str, **more: Any) -> float:
    """Self-certainty of the first answer of the example sessions, in nats."""
    session = sessions()[0]
    group = {
        "prompt": session["prompt"],
        "ground_truth": session["ground_truth"],
        "completions": session["completions"][:1],
    }
    answered = requests.post(f"{url}/score", json={"groups": [group], **more}, timeout=600)
    answered.raise_for_status()
    return float(answered.json()["groups"][0]["rewards"][0]["details"]["self_certainty_nats"])
