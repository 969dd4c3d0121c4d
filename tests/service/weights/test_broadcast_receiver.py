"""Broadcasts between two processes: they arrive bit for bit, and end if one side fails."""

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shopr1_client.updates.broadcast import PIECE_BYTES, BroadcastError, broadcast, serve_store
from shopr1_client.wire_policy import TransferRequest
from shopr1_service.weights import broadcast_receiver as transfer
from shopr1_service.weights.broadcast_receiver import TransferError, receive

HOST = "127.0.0.1"
WAIT_S = 120.0
PROMPT_S = 10.0
"""Well below the transfers' own time: nothing waits for a deadline."""
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
CPU = torch.device("cpu")


def request(
    port: int, tensors: Sequence[Tensor], timeout_s: float = WAIT_S, **fields: Any
) -> TransferRequest:
    specs = [
        {"name": f"t{i}", "dtype": NAMES[each.dtype], "shape": list(each.shape)}
        for i, each in enumerate(tensors)
    ]
    given = {"version": "1", "host": HOST, "port": port, "timeout_s": timeout_s, "tensors": specs, **fields}
    return TransferRequest.model_validate(given)


def all_kinds() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for dtype in NAMES:
        values = torch.randn(6, 10, generator=generator, dtype=torch.float64).to(dtype)
        values[0, 0], values[1, 1] = torch.nan, -torch.inf
        made += [values, values.T, values[::2, 1::3], values[0, 3], values[:0], values[2:3].expand(4, 10)]
    # Three pieces and a bit, none of which begins where a row does.
    made.append(torch.randn(7, (3 * PIECE_BYTES // 4 + 99) // 7, generator=generator))
    return made


def written(tensor: Tensor) -> bytes:
    whole = tensor.contiguous().view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
    return whole.numpy().tobytes()


def large() -> list[Tensor]:
    """Four pieces, and one more."""
    return [torch.arange(PIECE_BYTES, dtype=torch.float32), torch.zeros(3)]


def one_then(number: int) -> Iterator[Tensor]:
    """The sender ends, or is stopped, after the first tensor."""
    yield large()[0]
    os.kill(os.getpid(), number)
    yield large()[1]


def train(pipe: Connection) -> None:
    """A trainer: as many transfers as it is asked for."""
    while asked := pipe.recv():
        make, *arguments = asked
        with serve_store(HOST, WAIT_S) as store:
            pipe.send(store.port)
            try:
                broadcast(store, make(*arguments), backend="gloo", timeout_s=WAIT_S)
            except BroadcastError as error:
                pipe.send(str(error))
            else:
                pipe.send("sent")


def stop(pipe: Connection) -> None:
    store = serve_store(HOST, WAIT_S)
    pipe.send(store.port)
    os.kill(os.getpid(), signal.SIGSTOP)


def serve(pipe: Connection, max_num_pieces: int) -> None:
    """A service: dies when it has used so many pieces. Tells how much memory each transfer took."""

    def sink(_piece: memoryview) -> None:
        nonlocal max_num_pieces
        max_num_pieces -= 1
        if not max_num_pieces:
            os.kill(os.getpid(), signal.SIGKILL)

    while asked := pipe.recv():
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = memory_bytes("VmRSS")
        receive(asked, CPU, sink)
        pipe.send(memory_bytes("VmHWM") - before)


def memory_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


@contextlib.contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[tuple[Any, Connection]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(theirs, *arguments))
    child.start()
    theirs.close()
    try:
        yield child, ours
    finally:
        child.kill()  # also if it is stopped
        child.join()
        child.close()
        ours.close()


def heard(pipe: Connection, timeout_s: float = WAIT_S) -> Any:
    assert pipe.poll(timeout_s)
    return pipe.recv()


@pytest.fixture(scope="module")
def trainer() -> Iterator[Connection]:
    with process(train) as (_, pipe):
        yield pipe


def begun(pipe: Connection, make: Callable[..., Any], *arguments: Any) -> int:
    """A trainer's store, where it sends those tensors."""
    pipe.send((make, *arguments))
    port: int = heard(pipe)
    return port


def received(asked: TransferRequest) -> bytes:
    content = bytearray()
    receive(asked, CPU, content.extend)
    return bytes(content)


def drop(_piece: memoryview) -> None:
    pass


def failure(asked: TransferRequest, sink: Callable[[memoryview], None] = drop) -> tuple[str, float]:
    """Error message, and the time it took, s."""
    begin_s = time.monotonic()
    with pytest.raises(TransferError) as caught:
        receive(asked, CPU, sink)
    return str(caught.value), time.monotonic() - begin_s


def held() -> tuple[int, list[str]]:
    """Number of threads, and kinds of open descriptors except pipes to child processes."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            links.append(str(path.readlink()))
    kinds = [link.split(":")[0] for link in links if not link.startswith(("pipe:", "/dev", "/proc"))]
    return len(list(Path("/proc/self/task").iterdir())), sorted(kinds)


def is_again(before: tuple[int, list[str]]) -> bool:
    """The kernel lists a thread for a moment after it was joined."""
    end_s = time.monotonic() + PROMPT_S
    while held() != before and time.monotonic() < end_s:
        pass
    return held() == before


def test_every_kind_of_tensor_arrives_as_it_is_and_again_in_the_same_processes(trainer: Connection) -> None:
    expected = b"".join(map(written, all_kinds()))
    for _ in range(2):
        assert received(request(begun(trainer, all_kinds), all_kinds())) == expected
        assert heard(trainer) == "sent"


def test_a_piece_is_bounded_and_delivered_after_the_one_before_is_used(trainer: Connection) -> None:
    sizes: list[int] = []
    receive(request(begun(trainer, large), large()), CPU, lambda piece: sizes.append(len(piece)))
    assert heard(trainer) == "sent"
    assert sizes == [PIECE_BYTES] * 4 + [12]


def test_memory_does_not_grow_with_the_tensor() -> None:
    num_bytes = 400 * 10**6
    with process(serve, 0) as (_, pipe):
        for tensor in (torch.ones(1), torch.ones(num_bytes // 4)):
            with serve_store(HOST, WAIT_S) as store:
                pipe.send(request(store.port, [tensor]))
                broadcast(store, [tensor], backend="gloo", timeout_s=WAIT_S)
            grown_bytes = heard(pipe)
    assert grown_bytes < 2 * PIECE_BYTES


def test_a_trainer_that_dies_between_tensors() -> None:
    with process(train) as (_, pipe):
        said, took_s = failure(request(begun(pipe, one_then, signal.SIGKILL), large()))
    assert "1 of 2 tensors had arrived, and 0 of 12 bytes of 't1'" in said
    assert took_s < PROMPT_S


def test_a_trainer_that_dies_within_a_tensor() -> None:
    num_pieces = 0
    with process(train) as (child, pipe):

        def sink(_piece: memoryview) -> None:
            nonlocal num_pieces
            num_pieces += 1
            if num_pieces == 2:
                child.kill()
                child.join()

        said, took_s = failure(request(begun(pipe, large), large()), sink)
    assert num_pieces < 5
    num_bytes = num_pieces * PIECE_BYTES
    assert f"0 of 2 tensors had arrived, and {num_bytes} of {4 * PIECE_BYTES} bytes of 't0'" in said
    assert took_s < PROMPT_S


@pytest.mark.parametrize("num_pieces", [1, 5], ids=["first", "last"])
def test_a_service_that_dies(num_pieces: int) -> None:
    with process(serve, num_pieces) as (_, pipe), serve_store(HOST, WAIT_S) as store:
        pipe.send(request(store.port, large()))
        begin_s = time.monotonic()
        with pytest.raises(BroadcastError, match=r"[Cc]onnection"):
            broadcast(store, large(), backend="gloo", timeout_s=WAIT_S)
    assert time.monotonic() - begin_s < WAIT_S / 2  # the process had to begin


def test_a_trainer_that_is_stopped_is_left_at_the_deadline() -> None:
    with process(train) as (_, pipe):
        said, took_s = failure(request(begun(pipe, one_then, signal.SIGSTOP), large(), timeout_s=3.0))
    assert said.startswith("the 3 s are over; 1 of 2 tensors had arrived")
    assert 3.0 <= took_s < 4.0


def test_a_store_that_is_stopped_is_left_at_the_deadline() -> None:
    with process(stop) as (_, pipe):
        said, took_s = failure(request(heard(pipe), large(), timeout_s=2.0))
    assert HOST in said or "the 2 s are over" in said
    assert took_s < 3.0


def test_a_trainer_that_does_not_begin_is_left_at_the_deadline() -> None:
    with serve_store(HOST, WAIT_S) as store:
        said, took_s = failure(request(store.port, large(), timeout_s=1.0))
    assert said.startswith("the 1 s are over; 0 of 2 tensors had arrived")
    assert 1.0 <= took_s < 2.0


def test_a_sink_that_fails_ends_it_on_both_sides(trainer: Connection) -> None:
    def sink(_piece: memoryview) -> None:
        raise ValueError("no space left")

    port = begun(trainer, large)
    with pytest.raises(ValueError, match="no space left"):
        receive(request(port, large()), CPU, sink)
    assert heard(trainer, PROMPT_S) == "the service has given up: no space left"


def test_a_port_without_a_listener() -> None:
    with socket.create_server((HOST, 0)) as closed:
        port = closed.getsockname()[1]
    said, took_s = failure(request(port, large()))
    assert f"no trainer at {HOST}:{port}" in said
    assert took_s < PROMPT_S


def test_a_port_of_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_CONNECTION_S", 1.0)
    with socket.create_server((HOST, 0)) as silent:
        said, took_s = failure(request(silent.getsockname()[1], large()))
    assert f"no TCPStore at {HOST}" in said
    assert took_s < PROMPT_S


def test_a_trainer_that_gives_up_before_it_begins() -> None:
    with serve_store(HOST, WAIT_S) as store, ThreadPoolExecutor() as pool:
        waiting = pool.submit(failure, request(store.port, large()))
        broken = pool.submit(broadcast, store, _never(), backend="gloo", timeout_s=WAIT_S)
        with pytest.raises(ZeroDivisionError):
            broken.result(WAIT_S)
        said, took_s = waiting.result(WAIT_S)
    assert "0 of 2 tensors had arrived" in said
    assert took_s < PROMPT_S


def _never() -> Iterator[Tensor]:
    yield torch.ones(1 // 0)


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="this torch has NCCL")
def test_a_backend_that_is_not_there() -> None:
    said, _ = failure(request(1, large(), backend="nccl"))
    assert said.startswith("this torch lacks nccl")
    with serve_store(HOST, WAIT_S) as store, pytest.raises(BroadcastError, match="lacks nccl"):
        broadcast(store, large(), backend="nccl", timeout_s=WAIT_S)


def test_the_address_may_be_of_the_sixth_version() -> None:
    with serve_store("::1", WAIT_S) as store, ThreadPoolExecutor() as pool:
        content = pool.submit(received, request(store.port, large(), host="::1"))
        broadcast(store, large(), backend="gloo", timeout_s=WAIT_S)
        assert content.result(WAIT_S) == b"".join(map(written, large()))


def test_nothing_stays_of_a_transfer(trainer: Connection) -> None:
    def fails(_piece: memoryview) -> None:
        raise ValueError("no space left")

    errors = []  # their tracebacks hold nothing either

    def once(sink: Callable[[memoryview], None]) -> None:
        try:
            receive(request(begun(trainer, large), large()), CPU, sink)
        except ValueError as error:
            errors.append(error)
        heard(trainer)

    once(drop)
    before = held()
    for sink in (drop, fails, drop):
        once(sink)
        assert is_again(before)
    assert len(errors) == 1
    for number in (signal.SIGKILL, signal.SIGSTOP):
        with process(train) as (_, pipe):
            failure(request(begun(pipe, one_then, number), large(), timeout_s=3.0))
        assert is_again(before)


def test_nothing_stays_in_the_trainer() -> None:
    errors = []  # their tracebacks hold nothing either
    # The service dies in the third transfer.
    with process(serve, 12) as (_, pipe):
        for number in range(3):
            with serve_store(HOST, WAIT_S) as store:
                pipe.send(request(store.port, large()))
                try:
                    broadcast(store, large(), backend="gloo", timeout_s=WAIT_S)
                    heard(pipe)
                except BroadcastError as error:
                    errors.append(error)
            if number == 0:
                before = held()
            assert is_again(before)
    assert len(errors) == 1
