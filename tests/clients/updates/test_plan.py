"""Updates of the policy, of both clients, against servers behind real sockets."""

import asyncio
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from shopr1_client import AsyncClient, Client, MixedVersionsError, ProblemError, TransportError
from shopr1_client.errors import (
    ForbiddenError,
    InvalidWeightsError,
    NotReadyError,
    OverloadedError,
    StorageError,
    UpdateConflictError,
)
from shopr1_client.updates.plan import Answer
from shopr1_client.wire_policy import AdapterUpdate, PolicyState, PolicyUpdate, TransferRequest
from tests.support.http import WAIT_S, free_port
from tests.support.models import tiny_model
from tests.support.policy_server import Refusal, Reset, policy_server

Update = Callable[..., Answer]


def with_client(
    urls: str | Sequence[str], *given: Any, retry_for_s: float = WAIT_S, **options: Any
) -> Answer:
    with Client(urls, retry_for_s=retry_for_s) as client:
        return client.update_policy(*given, **options)


def with_async_client(
    urls: str | Sequence[str], *given: Any, retry_for_s: float = WAIT_S, **options: Any
) -> Answer:
    return asyncio.run(AsyncClient(urls, retry_for_s=retry_for_s).update_policy(*given, **options))


both = pytest.mark.parametrize("update", [with_client, with_async_client], ids=["sync", "async"])


def layer(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(5, 3)


def assert_sent(body: bytes, module: nn.Module) -> None:
    sent, expected = safetensors.torch.load(body), module.state_dict()
    assert sent.keys() == expected.keys()
    assert all(torch.equal(sent[name], tensor) for name, tensor in expected.items())


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


# --- a broadcast ------------------------------------------------------------------------------------


@both
def test_a_broadcast(update: Update) -> None:
    """The request announces the tensors; the route to the server is the loopback interface."""
    model = tiny_model(dtype=torch.bfloat16)
    with policy_server() as one, policy_server() as two:
        answer = update([one.url, two.url], model, "7", transport="gloo", timeout_s=WAIT_S)
    assert answer.current.version == "7"
    for server in one, two:
        [request] = server.received
        told = TransferRequest.model_validate_json(request.body)
        assert (told.version, told.partial, told.backend, told.host) == ("7", False, "gloo", "127.0.0.1")
        state = model.state_dict()
        assert {spec.name: (spec.dtype, tuple(spec.shape)) for spec in told.tensors} == {
            name: ("BF16", tuple(tensor.shape)) for name, tensor in state.items()
        }
        expected = [state[spec.name].contiguous().view(torch.int16) for spec in told.tensors]
        assert bytes(server.broadcast) == b"".join(tensor.numpy().tobytes() for tensor in expected)


@both
def test_a_broadcast_that_is_refused(update: Update) -> None:
    """The client does not wait for a server that refuses: the transfer's time limit is far longer."""
    fates = UpdateConflictError("another", retry_after_s=0.0), InvalidWeightsError("shape")
    with policy_server(*fates) as server, pytest.raises(InvalidWeightsError):
        update(server.url, layer(), "7", transport="gloo", timeout_s=20 * WAIT_S)
    assert len(server.received) == 2


@both
def test_a_broadcast_from_an_address_that_is_not_here(update: Update) -> None:
    with policy_server() as server, pytest.raises(ValueError, match=r"192\.0\.2\.1"):
        update(server.url, layer(), "7", transport="gloo", host="192.0.2.1")


@both
def test_a_broadcast_without_a_listener(update: Update) -> None:
    with pytest.raises(TransportError):
        update(f"http://127.0.0.1:{free_port()}", layer(), "7", transport="gloo", retry_for_s=0)


# --- several servers --------------------------------------------------------------------------------


@both
def test_every_server_gets_it(update: Update) -> None:
    with policy_server() as one, policy_server() as two:
        update([one.url, two.url], layer(), "7")
    for server in one, two:
        [request] = server.received
        assert_sent(request.body, layer())
        assert server.policy.base.version == "7"


@both
def test_some_servers_get_it(update: Update) -> None:
    failing = policy_server(InvalidWeightsError("not finite"))
    with policy_server() as one, failing as two, policy_server() as three:
        urls = [one.url, two.url, three.url]
        error = caught_mixed(lambda: update(urls, layer(), "7"))
        assert (error.version, error.updated, error.failed, error.untried) == (
            "7",
            urls[:1],
            urls[1],
            urls[2:],
        )
        assert str(error) == f"{urls[0]} have version '7'; {urls[1]} failed, and {urls[2]} were not tried"
        assert [server.policy.base.version for server in (one, two, three)] == ["7", "initial", "initial"]


def caught_mixed(call: Callable[[], Answer]) -> MixedVersionsError:
    with pytest.raises(MixedVersionsError) as caught:
        call()
    assert isinstance(caught.value.__cause__, InvalidWeightsError)
    copy = pickle.loads(pickle.dumps(caught.value))  # as worker processes hand it on
    assert isinstance(copy, MixedVersionsError)
    return copy


@both
def test_no_server_gets_it(update: Update) -> None:
    failing = policy_server(InvalidWeightsError("not finite"))
    with failing as one, policy_server() as two, pytest.raises(InvalidWeightsError, match="not finite"):
        update([one.url, two.url], layer(), "7")
    assert two.received == []


# --- retries ----------------------------------------------------------------------------------------

TRANSIENT = [
    UpdateConflictError("another", retry_after_s=0.0),
    OverloadedError("full", retry_after_s=0.0),
    NotReadyError("loading"),
]


@both
@pytest.mark.parametrize("error", TRANSIENT, ids=lambda error: error.code)
def test_transient_problems(update: Update, error: ProblemError) -> None:
    with policy_server(error, error) as server:
        answer = update(server.url, layer(), "7")
    assert answer.current.version == "7"
    bodies = [request.body for request in server.received]
    assert len(bodies) == 3
    for body in bodies:  # from its beginning each time
        assert_sent(body, layer())


@both
def test_a_connection_that_breaks_in_the_middle(update: Update) -> None:
    model = nn.Linear(1024, 5 * 1024, bias=False)
    with policy_server(Reset(after_bytes=10_000_000), Reset(after_bytes=0)) as server:
        update(server.url, model, "7")
    [request] = server.received
    assert_sent(request.body, model)
    assert server.policy.base.number == 1


@both
def test_a_server_that_is_down(update: Update) -> None:
    with pytest.raises(TransportError):
        update(f"http://127.0.0.1:{free_port()}", layer(), "7", retry_for_s=0)


@both
@pytest.mark.parametrize("kind", [InvalidWeightsError, ForbiddenError, StorageError])
def test_permanent_problems(update: Update, kind: type[ProblemError]) -> None:
    with policy_server(kind("for good")) as server, pytest.raises(kind, match="for good"):
        update(server.url, layer(), "7")
    assert len(server.received) == 1


@both
def test_a_refusal_before_the_weights_were_read(update: Update) -> None:
    """The answer arrives though the server has closed the connection upon 60 MB."""
    model = nn.Linear(4096, 4096, bias=False)
    with policy_server(Refusal(ForbiddenError("scope"))) as server, pytest.raises(ForbiddenError):
        update(server.url, model, "7")
    assert server.received == []


# --- answers that are lost --------------------------------------------------------------------------


@both
def test_a_lost_answer(update: Update) -> None:
    with policy_server(Reset(is_done=True)) as server:
        answer = update(server.url, layer(), "7")
    assert len(server.received) == 1
    assert isinstance(answer, PolicyUpdate)
    assert (answer.current, answer.former.version) == (server.policy.base, "initial")
    assert (answer.num_tensors, answer.num_bytes) == (2, (5 * 3 + 3) * 4)
    assert answer.pause_s is None
    assert answer.duration_s > 0


@both
def test_a_lost_answer_of_an_adapter(update: Update) -> None:
    with policy_server(Reset(is_done=True)) as server:
        server.policy.load("mine", "7", 1, is_default=False)
        answer = update(server.url, "/adapters/8", "8", adapter="mine")
    assert len(server.received) == 1
    assert isinstance(answer, AdapterUpdate)
    assert answer.current == server.policy.adapters[1]


@both
@pytest.mark.parametrize(("version", "adapter"), [("7", None), ("7", "mine"), ("8", None)])
def test_an_older_version_of_this_name_is_not_taken_for_it(
    update: Update, version: str, adapter: str | None
) -> None:
    """Nor is an adapter's version taken for the policy's, or another adapter's."""
    with policy_server(Reset()) as server:
        server.policy.change("7", 1)
        server.policy.load("mine", "7", 1, is_default=True)
        server.policy.load("other", "8", 1, is_default=True)
        former = server.policy.adapters[-1].number
        answer = update(server.url, "/models/7", version, adapter=adapter)
    assert len(server.received) == 2
    assert answer.current.number == former + 1


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
