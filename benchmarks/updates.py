"""How long the policy's weights take to change, against copies of the same bytes: `make bench-updates`.

Both ends of every copy are in the page cache or on the same disk as the service's own files. README.md says
what each row means.
"""

import argparse
import contextlib
import itertools
import json
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import save_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from report import Report
from serving import request_of, running, score, served
from shopr1_service.policy import factory as building
from shopr1_service.policy import loading as source
from shopr1_service.policy.loading import choose_device
from shopr1_service.policy.local import LoadedPolicy
from shopr1_service.settings import load_settings
from subject import load_model
from workloads import Shape, Workloads

FOLDER = Path(__file__).parent
WORKLOAD = "all weights"
COPY = "copy"
BLOCK_BYTES = 16 * 2**20
SCORED = Shape(200, 4, 16)
NUM_WARM_UPS = 1
"""Updates that do not count: the first writes the old weights down, and no later one does."""


@dataclass(frozen=True)
class Bench:
    """A service, and a checkpoint of its policy on the disk that it keeps new weights on."""

    client: httpx.Client
    directory: Path
    workloads: Workloads
    copier: httpx.URL
    """An HTTP server that writes what it is sent to `copy`."""

    @property
    def file(self) -> Path:
        return self.directory / "model.safetensors"

    @property
    def copy(self) -> Path:
        return self.directory / COPY


Update = dict[str, Any]
"""An answer to an update."""
_versions = itertools.count()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of an update against copies of the same bytes.")
    parser.add_argument("--runs", type=int, default=15, help="turns of which the median is taken")
    parser.add_argument("--directory", type=Path, help="on which disk; default: that of temporary files")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory, bench(Path(directory)) as subject:
        report = Report(choose_device("auto"), "float32")
        report.note(WORKLOAD, "bytes", subject.file.stat().st_size / 2**20, "MiB")
        alone(subject, options.runs, report)
        beside_scoring(subject, options.runs, report)
    report.write(options.output / "updates.csv")


@contextlib.contextmanager
def bench(directory: Path) -> Iterator[Bench]:
    """With the embedded policy in fp32."""
    settings = load_settings(
        {"dtype": "float32", "policy_roots": [directory], "staging_dir": directory, "log_level": "error"}
    )
    tokenizer, model = load_model(settings)
    policy: LoadedPolicy = building.build_policy(model, tokenizer, settings, name=source.EMBEDDED_NAME)
    save_file(dict(policy.weights.tensors), directory / "model.safetensors")
    with served(settings, policy) as client, running(_copier(directory / COPY)) as url:
        yield Bench(client, directory, Workloads(policy.codec), httpx.URL(url))


def _copier(path: Path) -> Starlette:
    """As it is usually written: starlette and uvicorn as they come."""

    async def copy(request: Request) -> Response:
        with path.open("wb", buffering=BLOCK_BYTES) as file:
            async for block in request.stream():
                file.write(block)
        return Response()

    return Starlette(routes=[Route("/copy", copy, methods=["PUT"])])


# --- what is timed ----------------------------------------------------------------------------------


def by_path(bench: Bench) -> Update:
    body = {"path": str(bench.directory), "version": f"{next(_versions)}"}
    answer: Update = bench.client.post("/policy/update", json=body).raise_for_status().json()
    return answer


def by_upload(bench: Bench) -> Update:
    update: Update = json.loads(
        _put(bench, bench.client.base_url, f"/policy/weights?version={next(_versions)}")
    )
    return update


def http_copy(bench: Bench) -> None:
    """An HTTP server writes to a file what it is sent."""
    _put(bench, bench.copier, "/copy")


def _put(bench: Bench, url: httpx.URL, path: str) -> bytes:
    """Over a bare socket: what the sender does is the same as in `tcp_copy`."""
    head = (
        f"PUT {path} HTTP/1.1\r\nHost: {url.host}\r\n"
        f"Connection: close\r\nContent-Length: {bench.file.stat().st_size}\r\n\r\n"
    )
    with socket.create_connection((url.host, url.port or 80)) as connection, bench.file.open("rb") as file:
        connection.sendall(head.encode())
        connection.sendfile(file)
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert answer.startswith(b"HTTP/1.1 200 OK"), answer
    return answer.partition(b"\r\n\r\n")[2]


def kernel_copy(bench: Bench) -> None:
    """As `cp` does it: the kernel moves the bytes."""
    shutil.copyfile(bench.file, bench.copy)


def plain_copy(bench: Bench) -> None:
    """Read and written, block by block."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with bench.file.open("rb", buffering=0) as read, bench.copy.open("wb", buffering=0) as written:
        while num_read := read.readinto(buffer):
            written.write(buffer[:num_read])


def tcp_copy(bench: Bench) -> None:
    """Sent over the loopback interface, received and written."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = threading.Thread(target=_receive, args=(listener, bench.copy))
        receiver.start()
        with socket.create_connection(listener.getsockname()) as connection, bench.file.open("rb") as file:
            connection.sendfile(file)
        receiver.join()


def _receive(listener: socket.socket, path: Path) -> None:
    buffer = memoryview(bytearray(BLOCK_BYTES))
    connection, _ = listener.accept()
    with connection, path.open("wb", buffering=0) as file:
        while num_received := connection.recv_into(buffer):
            file.write(buffer[:num_received])


# --- sections ---------------------------------------------------------------------------------------


def alone(bench: Bench, num_runs: int, report: Report) -> None:
    """Nothing else asks for anything. They take turns, so that a busy moment meets all alike."""
    calls = (by_path, by_upload, kernel_copy, plain_copy, tcp_copy, http_copy)
    turns = [[_time_s(bench, call) for call in calls] for _ in range(NUM_WARM_UPS + num_runs)][NUM_WARM_UPS:]
    path_s, upload_s, kernel_s, plain_s, tcp_s, http_s = (
        statistics.median(times) for times in zip(*turns, strict=True)
    )
    for name, value in [
        ("by path", path_s),
        ("by upload", upload_s),
        ("cp", kernel_s),
        ("read and write", plain_s),
        ("TCP copy", tcp_s),
        ("HTTP copy", http_s),
    ]:
        report.note(WORKLOAD, name, value, "s")
    report.note(WORKLOAD, "by path / cp", path_s / kernel_s, "x")
    report.note(WORKLOAD, "by path / read and write", path_s / plain_s, "x")
    report.note(WORKLOAD, "by upload / TCP copy", upload_s / tcp_s, "x")
    report.note(WORKLOAD, "by upload / HTTP copy", upload_s / http_s, "x")


def _time_s(bench: Bench, call: Any) -> float:  # noqa: ANN401  # one of the above
    start_s = time.perf_counter()
    call(bench)
    duration_s = time.perf_counter() - start_s
    bench.copy.unlink(missing_ok=True)
    return duration_s


def beside_scoring(bench: Bench, num_runs: int, report: Report) -> None:
    """A client scores all the time: how long it waits at most while the weights change."""
    for name, call in (("by path", by_path), ("by upload", by_upload)):
        pauses_s, gaps_s, usual_s = [], [], []
        for _ in range(num_runs):
            with scoring(bench) as ends_s:
                _wait_for(ends_s, 5)
                num_before = len(ends_s)
                pauses_s.append(call(bench)["pause_s"])
                _wait_for(ends_s, len(ends_s) + 2)
            gaps = [after - before for before, after in itertools.pairwise(ends_s)]
            usual_s.append(statistics.median(gaps[: num_before - 1]))
            gaps_s.append(max(gaps[num_before - 1 :]))
        report.note(WORKLOAD, f"{name}, beside scoring: pause", statistics.median(pauses_s), "s")
        report.note(WORKLOAD, f"{name}, beside scoring: longest gap", statistics.median(gaps_s), "s")
        report.note(WORKLOAD, f"{name}, beside scoring: usual gap", statistics.median(usual_s), "s")


@contextlib.contextmanager
def scoring(bench: Bench) -> Iterator[Sequence[float]]:
    """The times at which a client got answers, each to a prompt that is new."""
    ends_s: list[float] = []
    is_over = threading.Event()

    def run() -> None:
        with httpx.Client(base_url=bench.client.base_url, timeout=bench.client.timeout) as client:
            while not is_over.is_set():
                score(client, request_of(bench.workloads.group(SCORED)))
                ends_s.append(time.perf_counter())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ends_s
    finally:
        is_over.set()
        thread.join()


def _wait_for(ends_s: Sequence[float], num: int) -> None:
    while len(ends_s) < num:
        time.sleep(0.001)


if __name__ == "__main__":
    main()
