"""The group of two: broadcasts in both directions, deadlines, and torch's errors in one line."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch._C._distributed_c10d import TCPStore  # torch.distributed does not export it

from shopr1_client.updates.broadcast import serve_store
from shopr1_client.updates.process_group import Deadline, Group, GroupError, check_backend, reason

HOST = "127.0.0.1"
WAIT_S = 60.0
PROMPT_S = 10.0
"""Well below `WAIT_S`: nothing waits for that deadline."""


def run_pair(one: Callable[[Group], None], other: Callable[[Group], None], timeout_s: float = WAIT_S) -> None:
    """Run both ranks of a group in threads; raises the error of rank 0."""

    def run(rank: int, work: Callable[[Group], None]) -> None:
        # Each rank has a connection of its own, which a blocking call occupies.
        with Group(
            TCPStore(HOST, store.port, is_master=False, timeout=timedelta(seconds=WAIT_S)),
            rank,
            backend="gloo",
            address=HOST,
            deadline=Deadline(timeout_s if rank == 0 else WAIT_S),
            formation=Deadline(WAIT_S),
        ) as group:
            work(group)

    with serve_store(HOST, WAIT_S) as store, ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, 0, one), pool.submit(run, 1, other)]
        for future in futures:
            future.exception(WAIT_S)
    futures[0].result()


def test_either_rank_can_be_the_root() -> None:
    forth, back = torch.zeros(3, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)

    def send(group: Group) -> None:
        group.broadcast(torch.tensor([1, 2, 3], dtype=torch.uint8), 0)
        group.broadcast(back, 1)

    def receive(group: Group) -> None:
        group.broadcast(forth, 0)
        group.broadcast(torch.tensor([7], dtype=torch.uint8), 1)

    run_pair(send, receive)
    assert (forth.tolist(), back.tolist()) == ([1, 2, 3], [7])


def test_a_silent_peer_is_abandoned_at_the_deadline() -> None:
    is_abandoned = threading.Event()

    def receive(group: Group) -> None:
        begin_s = time.monotonic()
        with pytest.raises(GroupError):
            group.broadcast(torch.zeros(1, dtype=torch.uint8), 1)
        assert 0.3 < time.monotonic() - begin_s < PROMPT_S
        with pytest.raises(GroupError, match="the deadline has passed"):
            group.broadcast(torch.zeros(1, dtype=torch.uint8), 1)
        is_abandoned.set()

    def stay_silent(_group: Group) -> None:
        assert is_abandoned.wait(WAIT_S)

    run_pair(receive, stay_silent, timeout_s=1.0)


def test_a_peer_that_disconnects_is_noticed_at_once() -> None:
    def receive(group: Group) -> None:
        group.broadcast(torch.zeros(1, dtype=torch.uint8), 1)

    begin_s = time.monotonic()
    with pytest.raises(GroupError):
        run_pair(receive, lambda group: None)
    assert time.monotonic() - begin_s < PROMPT_S


def test_a_peer_that_does_not_join() -> None:
    formation = Deadline(0.3)
    with serve_store(HOST, WAIT_S) as store:
        assert store.inner is not None
        with pytest.raises(GroupError, match="the other side did not join"):
            Group(
                store.inner, 0, backend="gloo", address=HOST, deadline=Deadline(WAIT_S), formation=formation
            )
    assert formation.left_s == 0.0


def test_a_deadline() -> None:
    deadline = Deadline(100.0)
    assert 99.0 < deadline.left_s <= 100.0
    assert 99.0 < deadline.left.total_seconds() <= 100.05
    over = Deadline(-1.0)
    assert over.left_s == 0.0
    assert over.left.total_seconds() == 0.05  # torch takes 0 for no limit


def test_unknown_backends() -> None:
    check_backend("gloo")
    with pytest.raises(GroupError, match="no backend 'mpi': it is gloo or nccl"):
        check_backend("mpi")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[/src/a.cc:12] Connection closed by peer. Check the log.\nStack:\n#1", "Connection closed by peer"),
        ("[/src/a.cc:12] [/src/b.cc:3] Timed out", "Timed out"),
        ("no prefix. Two sentences", "no prefix. Two sentences"),
        ("wait timeout after 100ms\nmore", "wait timeout after 100ms"),
    ],
)
def test_the_reason_of_an_error(text: str, expected: str) -> None:
    assert reason(RuntimeError(text)) == expected
