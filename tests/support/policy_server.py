"""A small HTTP server that accepts weight updates like the service, and fails on request."""

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import torch

from shopr1_client.errors import ProblemError
from shopr1_client.wire_policy import AdapterUpdate, PolicyState, PolicyUpdate, TransferRequest, VersionInfo
from shopr1_service.weights.broadcast_receiver import receive
from tests.support.http import WAIT_S

PIECE_BYTES = 2**20


@dataclass(frozen=True)
class Received:
    """A request that came to its end.

    Attributes:
        body: empty where the server keeps none.
        digest: sha256 of it.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    num_bytes: int
    digest: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reset:
    """The connection breaks: after so many bytes of the body, or after all of it.

    Attributes:
        is_done: whether the update takes place all the same; its answer is lost.
    """

    after_bytes: int | None = None
    is_done: bool = False


@dataclass(frozen=True)
class Refusal:
    """An answer before anything of the body is read; then the connection is closed."""

    error: ProblemError


INITIAL = VersionInfo(version="initial", number=0, loaded_at=0.0)

Fate = ProblemError | Reset | Refusal
"""Send a problem after the whole body was received."""


@dataclass
class Policy:
    """Loaded versions of the server. Each change gets the next number."""

    base: VersionInfo = INITIAL
    adapters: list[VersionInfo] = field(default_factory=list)
    default_adapter: str | None = None

    @property
    def state(self) -> PolicyState:
        named = [info for info in self.adapters if info.adapter == self.default_adapter]
        return PolicyState(
            model="tiny",
            current=[self.base, *named][-1],
            base=self.base,
            adapters=self.adapters,
            default_adapter=self.default_adapter,
            update=None,
        )

    def change(self, version: str, num_bytes: int) -> PolicyUpdate:
        former, self.base = self.base, self._info(version, None)
        self.adapters, self.default_adapter = [], None
        return PolicyUpdate(
            current=self.base,
            former=former,
            num_tensors=1,
            num_bytes=num_bytes,
            duration_s=0.5,
            pause_s=0.25,
        )

    def load(self, name: str, version: str, num_bytes: int, is_default: bool) -> AdapterUpdate:
        self.adapters.append(self._info(version, name))
        self.default_adapter = name if is_default else self.default_adapter
        return AdapterUpdate(
            current=self.adapters[-1], rank=2, num_layers=3, num_bytes=num_bytes, duration_s=0.5
        )

    def _info(self, version: str, adapter: str | None) -> VersionInfo:
        number = 1 + max(info.number for info in (self.base, *self.adapters))
        return VersionInfo(version=version, number=number, adapter=adapter, loaded_at=0.0)


class PolicyServer(ThreadingHTTPServer):
    """Server with the weight-update routes of the service.

    Attributes:
        fates: of the updates that come, in order; those after them succeed.
        received: the updates that came as a whole, whatever their fate was.
        broadcast: the bytes of all tensors that a trainer broadcast.
    """

    daemon_threads = True

    def __init__(self, *fates: Fate, keeps_bodies: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.policy = Policy()
        self.fates = list(fates)
        self.keeps_bodies = keeps_bodies
        self.received: list[Received] = []
        self.broadcast = bytearray()

    def shutdown_request(self, request: Any) -> None:
        request.close()  # without the farewell that would turn a reset into an end

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up


class _Handler(BaseHTTPRequestHandler):
    server: PolicyServer
    timeout = WAIT_S

    def do_GET(self) -> None:
        self._answer(200, self.server.policy.state.model_dump_json().encode())

    def do_POST(self) -> None:
        self._update()

    def do_PUT(self) -> None:
        self._update()

    def _update(self) -> None:
        fate = self.server.fates.pop(0) if self.server.fates else None
        match fate:
            case Refusal(error):
                self._problem(error)
            case Reset(int(after_bytes)):
                self.rfile.read(after_bytes)
                self._reset()
            case _:
                request = self._read()
                self.server.received.append(request)
                self._finish(request, fate)

    def _finish(self, request: Received, fate: Fate | None) -> None:
        if isinstance(fate, ProblemError):
            self._problem(fate)
            return
        answer = self._change(request) if not isinstance(fate, Reset) or fate.is_done else b""
        if isinstance(fate, Reset):
            self._reset()
        else:
            self._answer(200, answer)

    def _read(self) -> Received:
        digest, pieces, num_left = hashlib.sha256(), [], int(self.headers["Content-Length"])
        while num_left and (piece := self.rfile.read(min(num_left, PIECE_BYTES))):
            num_left -= len(piece)
            digest.update(piece)
            pieces.append(piece if self.server.keeps_bodies else b"")
        assert not num_left
        url = urlsplit(self.path)
        return Received(
            method=self.command,
            path=url.path,
            query=dict(parse_qsl(url.query)),
            headers={name.lower(): value for name, value in self.headers.items()},
            body=b"".join(pieces),
            num_bytes=int(self.headers["Content-Length"]),
            digest=digest.hexdigest(),
        )

    def _change(self, request: Received) -> bytes:
        policy, num_bytes = self.server.policy, request.num_bytes
        given = request.query if request.method == "PUT" else request.json
        if request.path.startswith("/policy/adapters"):
            name = given.get("name") or request.path.rpartition("/")[2]
            answer = policy.load(name, given["version"], num_bytes, given["default"] in (True, "true"))
            return answer.model_dump_json().encode()
        if request.path == "/policy/transfer":
            wanted = TransferRequest.model_validate_json(request.body)
            receive(wanted, torch.device("cpu"), self.server.broadcast.extend)
        return policy.change(given["version"], num_bytes).model_dump_json().encode()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _problem(self, error: ProblemError) -> None:
        retry_after_s = error.retry_after_s
        headers = {} if retry_after_s is None else {"Retry-After": f"{retry_after_s:.0f}"}
        self._answer(error.status, json.dumps(error.to_problem("7")).encode(), headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: Any) -> None:
        pass


@contextmanager
def policy_server(*fates: Fate, keeps_bodies: bool = True) -> Iterator[PolicyServer]:
    """A running server, at `.url`."""
    with PolicyServer(*fates, keeps_bodies=keeps_bodies) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
