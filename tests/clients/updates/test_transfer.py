"""Broadcasts of weights that an HTTP request announces, from both clients, over loopback sockets."""

import pytest
import torch

from shopr1_client import TransportError
from shopr1_client.errors import (
    InvalidWeightsError,
    UpdateConflictError,
)
from shopr1_client.wire_policy import TransferRequest
from tests.support.client_updates import Update, both, layer
from tests.support.http import WAIT_S, free_port
from tests.support.models import tiny_model
from tests.support.policy_server import policy_server


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
