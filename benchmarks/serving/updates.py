"""Duration of weight updates, against copies of the same bytes. Run by `make bench-updates`.

Both ends of every copy are in the page cache or on the same disk as the service's own files.
benchmarks/README.md explains each row.
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

from benchmarks.report import Report
from benchmarks.serving.local_server import request_of, running, score, served
from benchmarks.subject import embedded_policy
from benchmarks.workloads import Shape, Workloads
from shopr1_service.policy.loading import choose_device
from shopr1_service.settings import load_settings

FOLDER = Path(__file__).parent
WORKLOAD = "all weights"
COPY = "copy"
BLOCK_BYTES = 16 * 2**20
SCORED = Shape(200, 4, 16)
NUM_WARM_UPS = 1
"""Updates that are not timed: only the first one saves the old weights."""


@dataclass(frozen=True)
class Bench:
    """A service, and a checkpoint of its policy on the disk of `staging_dir`."""

    client: httpx.Client
    directory: Path
    workloads: Workloads
    copier: httpx.URL
    """URL of an HTTP server that writes request bodies to `copy`."""

    @property
    def file(self) -> Path:
        return self.directory / "model.safetensors"

    @property
    def copy(self) -> Path:
        return self.directory / COPY


Update = dict[str, Any]
"""Response to an update."""
_versions = itertools.count()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of an update against copies of the same bytes.")
    parser.add_argument("--runs", type=int, default=15, help="runs, of which the median is reported")
    parser.add_argument(
        "--directory", type=Path, help="folder on the disk to measure; default: temporary files"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory, bench(Path(directory)) as subject:
        report = Report(choose_device("auto"), "float32")
        report.add(WORKLOAD, "bytes", subject.file.stat().st_size / 2**20, "MiB")
        alone(subject, options.runs, report)
        beside_scoring(subject, options.runs, report)
    report.write(options.output / "updates.csv")


@contextlib.contextmanager
def bench(directory: Path) -> Iterator[Bench]:
    """Bench with the embedded policy in fp32."""
    settings = load_settings(
        {"dtype": "float32", "policy_roots": [directory], "staging_dir": directory, "log_level": "error"}
    )
    policy = embedded_policy(settings)
    save_file(dict(policy.weights.tensors), directory / "model.safetensors")
    with served(settings, policy) as client, running(_copier(directory / COPY)) as url:
        yield Bench(client, directory, Workloads(policy.codec), httpx.URL(url))


def _copier(path: Path) -> Starlette:
    """A plain upload handler: starlette and uvicorn with their defaults."""

    async def copy(request: Request) -> Response:
        with path.open("wb", buffering=BLOCK_BYTES) as file:
            async for block in request.stream():
                file.write(block)
        return Response()

    return Starlette(routes=[Route("/copy", copy, methods=["PUT"])])


# --- timed calls ----------------------------------------------------------------------------------


def by_path(bench: Bench) -> Update:
    body = {"path": str(bench.directory), "version": f"{next(_versions)}"}
    response: Update = bench.client.post("/policy/update", json=body).raise_for_status().json()
    return response


def by_upload(bench: Bench) -> Update:
    update: Update = json.loads(
        _put(bench, bench.client.base_url, f"/policy/weights?version={next(_versions)}")
    )
    return update


def http_copy(bench: Bench) -> None:
    """Upload to an HTTP server that writes the body to a file."""
    _put(bench, bench.copier, "/copy")


def _put(bench: Bench, url: httpx.URL, path: str) -> bytes:
    """Send a PUT over a bare socket: the sender's work equals that of `tcp_copy`."""
    head = (
        f"PUT {path} HTTP/1.1\r\nHost: {url.host}\r\n"
        f"Connection: close\r\nContent-Length: {bench.file.stat().st_size}\r\n\r\n"
    )
    with socket.create_connection((url.host, url.port or 80)) as connection, bench.file.open("rb") as file:
        connection.sendall(head.encode())
        connection.sendfile(file)
        response = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert response.startswith(b"HTTP/1.1 200 OK"), response
    return response.partition(b"\r\n\r\n")[2]


def kernel_copy(bench: Bench) -> None:
    """Copy as `cp` does: the kernel moves the bytes."""
    shutil.copyfile(bench.file, bench.copy)


def plain_copy(bench: Bench) -> None:
    """Copy by reads and writes, block by block."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with bench.file.open("rb", buffering=0) as read, bench.copy.open("wb", buffering=0) as written:
        while num_read := read.readinto(buffer):
            written.write(buffer[:num_read])


def tcp_copy(bench: Bench) -> None:
    """Copy over a loopback TCP connection into a file."""
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
    """Updates and copies on an idle service. The calls alternate, so that a busy moment affects all."""
    calls = (by_path, by_upload, kernel_copy, plain_copy, tcp_copy, http_copy)
    rounds = [[_time_s(bench, call) for call in calls] for _ in range(NUM_WARM_UPS + num_runs)][NUM_WARM_UPS:]
    path_s, upload_s, kernel_s, plain_s, tcp_s, http_s = (
        statistics.median(times) for times in zip(*rounds, strict=True)
    )
    for name, value in [
        ("by path", path_s),
        ("by upload", upload_s),
        ("cp", kernel_s),
        ("read and write", plain_s),
        ("TCP copy", tcp_s),
        ("HTTP copy", http_s),
    ]:
        report.add(WORKLOAD, name, value, "s")
    report.add(WORKLOAD, "by path / cp", path_s / kernel_s, "x")
    report.add(WORKLOAD, "by path / read and write", path_s / plain_s, "x")
    report.add(WORKLOAD, "by upload / TCP copy", upload_s / tcp_s, "x")
    report.add(WORKLOAD, "by upload / HTTP copy", upload_s / http_s, "x")


def _time_s(bench: Bench, call: Any) -> float:  # noqa: ANN401  # one of the calls above
    start_s = time.perf_counter()
    call(bench)
    duration_s = time.perf_counter() - start_s
    bench.copy.unlink(missing_ok=True)
    return duration_s


def beside_scoring(bench: Bench, num_runs: int, report: Report) -> None:
    """Updates while a client scores: the engine's pause, and the client's longest wait."""
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
        report.add(WORKLOAD, f"{name}, beside scoring: pause", statistics.median(pauses_s), "s")
        report.add(WORKLOAD, f"{name}, beside scoring: longest gap", statistics.median(gaps_s), "s")
        report.add(WORKLOAD, f"{name}, beside scoring: usual gap", statistics.median(usual_s), "s")


@contextlib.contextmanager
def scoring(bench: Bench) -> Iterator[Sequence[float]]:
    """Times at which a client received responses, each for a new prompt."""
    ends_s: list[float] = []
    stop = threading.Event()

    def run() -> None:
        with httpx.Client(base_url=bench.client.base_url, timeout=bench.client.timeout) as client:
            while not stop.is_set():
                score(client, request_of(bench.workloads.group(SCORED)))
                ends_s.append(time.perf_counter())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ends_s
    finally:
        stop.set()
        thread.join()


def _wait_for(ends_s: Sequence[float], num: int) -> None:
    while len(ends_s) < num:
        time.sleep(0.001)


if __name__ == "__main__":
    main()
