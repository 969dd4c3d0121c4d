"""Updates of several servers, retries and lost responses, of both clients, over loopback sockets."""

import pickle
from collections.abc import Callable

import pytest
from torch import nn

from shopr1_client import MixedVersionsError, ProblemError, TransportError
from shopr1_client.errors import (
    ForbiddenError,
    InvalidWeightsError,
    NotReadyError,
    OverloadedError,
    StorageError,
    UpdateConflictError,
)
from shopr1_client.updates.plan import Answer
from shopr1_client.wire_policy import AdapterUpdate, PolicyUpdate
from tests.support.client_updates import Update, assert_sent, both, layer
from tests.support.http import free_port
from tests.support.policy_server import Refusal, Reset, policy_server


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
    """The answer arrives though the server has closed the connection upon 60 MB.

    Where the network drops it with the rest, the client asks again, and is refused again.
    """
    model = nn.Linear(4096, 4096, bias=False)
    refusals = [Refusal(ForbiddenError("scope"))] * 20
    with policy_server(*refusals) as server, pytest.raises(ForbiddenError):
        update(server.url, model, "7")
    assert server.received == []


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
