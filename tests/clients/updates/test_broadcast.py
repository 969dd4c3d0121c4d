"""The trainer's side of a broadcast: the store, the announced tensors and their pieces."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from shopr1_client.updates.broadcast import PIECE_BYTES, BroadcastError, broadcast, cut, serve_store
from shopr1_client.wire_policy import TransferRequest
from shopr1_service.weights.broadcast_receiver import TransferError, receive

CPU = torch.device("cpu")
HOST = "127.0.0.1"
WAIT_S = 120.0
PROMPT_S = 10.0
"""Well below the transfers' own time: nothing waits for a deadline."""


def large() -> list[Tensor]:
    """Four pieces, and one more."""
    return [torch.arange(PIECE_BYTES, dtype=torch.float32), torch.zeros(3)]


def test_pieces_are_the_whole_and_do_not_overlap() -> None:
    for element_bytes in (1, 2, 4, 8):
        step = PIECE_BYTES // element_bytes
        for num_elements in (0, 1, step - 1, step, step + 1, 3 * step):
            spans = list(cut(num_elements, element_bytes))
            assert [0, *(end for _, end in spans)] == [*(first for first, _ in spans), num_elements]
            assert all(0 < (end - first) * element_bytes <= PIECE_BYTES for first, end in spans)


def test_a_service_that_does_not_join_need_not_be_waited_for() -> None:
    with serve_store(HOST, WAIT_S) as store:
        begin_s = time.monotonic()
        threading.Timer(0.0, store.cancel).start()
        with pytest.raises(BroadcastError, match="cancelled"):
            broadcast(store, large(), backend="gloo", timeout_s=WAIT_S)
    assert time.monotonic() - begin_s < PROMPT_S
    with (
        serve_store(HOST, WAIT_S) as store,
        pytest.raises(BroadcastError, match=r"has not joined within 0\.1 s"),
    ):
        broadcast(store, large(), backend="gloo", timeout_s=0.1)
    with pytest.raises(BroadcastError, match="every transfer needs its own"):
        broadcast(store, large(), backend="gloo", timeout_s=0.1)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ([torch.ones(4), torch.ones(3)], "tensor 0 has 16 bytes, and 12 were announced"),
        ([torch.ones(3)], "2 tensors were announced, not 1"),
        ([torch.ones(3)] * 3, "2 tensors were announced, not more"),
    ],
)
def test_tensors_that_were_not_announced(sent: list[Tensor], said: str) -> None:
    """Both sides fail, the service long before its deadline."""
    specs = [{"name": name, "dtype": "F32", "shape": [3]} for name in ("a", "b")]
    with serve_store(HOST, WAIT_S) as store, ThreadPoolExecutor() as pool:
        asked = {"version": "1", "host": HOST, "port": store.port, "timeout_s": WAIT_S, "tensors": specs}
        begin_s = time.monotonic()
        waiting = pool.submit(receive, TransferRequest.model_validate(asked), CPU, lambda piece: None)
        with pytest.raises(BroadcastError, match=said):
            broadcast(store, sent, backend="gloo", timeout_s=WAIT_S)
        with pytest.raises(TransferError):
            waiting.result(WAIT_S)
    assert time.monotonic() - begin_s < PROMPT_S


def test_a_store_needs_an_address_that_can_be_reached() -> None:
    with pytest.raises(BroadcastError, match="name one of this machine's"):
        serve_store("0.0.0.0", WAIT_S)
    with pytest.raises(BroadcastError, match="no store can be served"):
        serve_store("no.such.host.invalid", WAIT_S)
