"""Requests that update the policy, of both clients, against servers behind real sockets."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shopr1_client import AsyncClient, Client
from shopr1_client.wire_policy import AdapterUpdate, PolicyState, PolicyUpdate
from tests.support.client_updates import Update, assert_sent, both, layer
from tests.support.models import tiny_model
from tests.support.policy_server import policy_server

# --- requests ---------------------------------------------------------------------------------------


@both
def test_a_model(update: Update) -> None:
    model = tiny_model()
    with policy_server() as server:
        answer = update(server.url, model, "step 1/3")
    [request] = server.received
    assert (request.method, request.path) == ("PUT", "/policy/weights")
    assert request.query == {"version": "step 1/3", "partial": "false"}
    assert request.headers["content-type"] == "application/octet-stream"
    assert int(request.headers["content-length"]) == len(request.body)
    assert_sent(request.body, model)
    assert isinstance(answer, PolicyUpdate)
    assert (answer.current.version, answer.former.version) == ("step 1/3", "initial")
    assert answer.num_bytes == len(request.body)


@both
def test_some_tensors(update: Update) -> None:
    with policy_server() as server:
        update(server.url, layer().state_dict(), "1", partial=True)
    [request] = server.received
    assert request.query == {"version": "1", "partial": "true"}
    assert_sent(request.body, layer())


@both
@pytest.mark.parametrize("path", ["/models/7", Path("/models/7")], ids=["str", "Path"])
def test_a_checkpoint(update: Update, path: str | Path) -> None:
    with policy_server() as server:
        update(server.url, path, "7")
    [request] = server.received
    assert (request.method, request.path) == ("POST", "/policy/update")
    assert request.headers["content-type"] == "application/json"
    assert request.json == {"path": "/models/7", "version": "7", "partial": False}


@both
def test_an_adapter_of_a_directory(update: Update) -> None:
    with policy_server() as server:
        answer = update(server.url, "/adapters/7", "7", adapter="mine")
        update(server.url, "/adapters/8", "8", adapter="mine", default=False)
    assert isinstance(answer, AdapterUpdate)
    assert (answer.current.version, answer.current.adapter) == ("7", "mine")
    assert [(request.method, request.path) for request in server.received] == [
        ("POST", "/policy/adapters")
    ] * 2
    assert [request.json for request in server.received] == [
        {"name": "mine", "path": "/adapters/7", "version": "7", "default": True},
        {"name": "mine", "path": "/adapters/8", "version": "8", "default": False},
    ]


@both
@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (layer(), {"adapter": "mine"}, "no adapter in it"),
        (layer().state_dict(), {"adapter": "mine"}, "no adapter in it"),
        ("/adapters/7", {"adapter": "mine", "partial": True}, "as a whole"),
        ("/models/7", {"transport": "gloo"}, "reads a path itself"),
        ({"weight": torch.ones(2, dtype=torch.int8)}, {}, "^weight is a Tensor of torch.int8"),
    ],
)
def test_sources_that_cannot_be_sent(
    update: Update, source: Any, options: dict[str, Any], message: str
) -> None:
    with policy_server() as server, pytest.raises(ValueError, match=message):
        update(server.url, source, "7", **options)
    assert server.received == []


def test_policy() -> None:
    async def ask(url: str) -> PolicyState:
        async with AsyncClient(url) as client:
            return await client.policy()

    with policy_server() as server, Client(server.url) as client:
        client.update_policy("/adapters/1", "1", adapter="mine")
        state = client.policy()
        assert state == server.policy.state == asyncio.run(ask(server.url))
    assert (state.base.version, state.current.version, state.default_adapter) == ("initial", "1", "mine")


# --- memory -----------------------------------------------------------------------------------------

_SEND = """
import resource, sys
import torch
from shopr1_client import Client
model = torch.nn.Sequential(*(torch.nn.Linear(5120, 5120, bias=False) for _ in range(4)))
with Client(sys.argv[1]) as client:
    client.update_policy({"warm": torch.ones(3_000_000)}, "0", partial=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    client.update_policy(model, "1")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded() -> None:
    """400 MB of weights, and some pieces of them beside."""
    with policy_server(keeps_bodies=False) as server:
        command = [sys.executable, "-c", _SEND, server.url]
        grown_kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert server.received[-1].num_bytes > 4 * 5120**2 * 4
    assert grown_kib < 32 * 1024
