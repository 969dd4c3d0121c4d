"""The service on a loopback socket of this process, and requests to it."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from shopr1_service.core import TokenGroup
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.server.app import create_app
from shopr1_service.server.http_protocol import connection_class
from shopr1_service.settings import Settings
from shopr1_service.updates.updatable_engine import UpdatableEngine

REQUEST_TIMEOUT_S = 600.0
READY_TIMEOUT_S = 300.0
POLL_S = 0.05
TRUTH = {"type": "click", "name": "results.blue_stoneware_mug.view_product"}
CHANGES_TO_RULES_ONLY = {'name = "shop_r1"': 'name = "rules_only"', "alpha = 0.005": "alpha = 0.0"}

Body = dict[str, Any]


@contextlib.contextmanager
def served(settings: Settings, policy: LoadedPolicy) -> Iterator[httpx.Client]:
    """Client of a service with this policy. Both end with the block."""
    app = create_app(settings, UpdatableEngine.opener(lambda: policy))
    with (
        running(app, http=connection_class(settings.receive_timeout_s)) as url,
        httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S) as client,
    ):
        wait_until_ready(client)
        yield client


@contextlib.contextmanager
def running(app: Starlette, http: type[H11Protocol] = H11Protocol) -> Iterator[str]:
    """URL of an application under uvicorn, in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", http=http))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def wait_until_ready(client: httpx.Client) -> None:
    """Poll `/health/ready` until it succeeds.

    Raises:
        TimeoutError: not within `READY_TIMEOUT_S`.
    """
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health/ready").is_success:
                return
        time.sleep(POLL_S)
    raise TimeoutError("the service did not become ready")


def score(client: httpx.Client, body: Body) -> list[Any]:
    """Rewards of all groups of a request. Every rollout must be scored."""
    groups = client.post("/score", json=body).raise_for_status().json()["groups"]
    rewards = [reward for group in groups for reward in group["rewards"]]
    assert all(reward["status"] == "scored" for reward in rewards)
    return rewards


def score_burst(client: httpx.Client, bodies: Sequence[Body]) -> None:
    """Send all requests at once."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        list(pool.map(lambda body: score(client, body), bodies))


def request_of(group: TokenGroup) -> Body:
    """One request with the whole group."""
    return _request(group, [list(completion.ids) for completion in group.completions])


def single_requests_of(group: TokenGroup) -> list[Body]:
    """One request per completion."""
    return [_request(group, [list(completion.ids)]) for completion in group.completions]


def _request(group: TokenGroup, completions: Sequence[list[int]]) -> Body:
    return {
        "groups": [
            {
                "prompt": {"token_ids": list(group.prompt_ids)},
                "ground_truth": {"type": "terminate"},
                "completions": [{"token_ids": ids} for ids in completions],
            }
        ]
    }


def rules_only_request(num_groups: int, num_completions: int, number: int) -> Body:
    """A request of complete answers with rationales, half of them with the human's action.

    Args:
        number: makes the request unique, so that it cannot be served as a duplicate.
    """
    completions = [_answer(i) for i in range(num_completions)]
    group = {"prompt": f"<main>{number}</main> What next?", "ground_truth": TRUTH, "completions": completions}
    return {"groups": [group] * num_groups}


def _answer(i: int) -> str:
    rationale = f"We need {i + 2} mugs, all of one kind, and I would like to see the blue ones from close by."
    name = TRUTH["name"] if i % 2 else "results.white_stoneware_mug.add_to_cart"
    return json.dumps({"rationale": rationale, "action": {"type": "click", "name": name}})


def write_rules_only_recipe(directory: Path) -> Path:
    """Write the shipped recipe with weight 0 for self-certainty: the engine never runs for it."""
    text = (resources.files("shopr1_rewards") / "recipes" / "shop_r1.toml").read_text("utf-8")
    for shipped, changed in CHANGES_TO_RULES_ONLY.items():
        assert shipped in text
        text = text.replace(shipped, changed)
    path = directory / "rules_only.toml"
    path.write_text(text, "utf-8")
    return path
