"""Spans that a collector receives, and that no request waits for it."""

import contextlib
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from prometheus_client.parser import text_string_to_metric_families

from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service import __version__
from shopr1_service.core import Certainty, TokenGroup, Unmeasurable, Version
from shopr1_service.errors import SettingsError
from shopr1_service.monitoring import tracing
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server.app import create_app, open_tracer
from shopr1_service.settings import Settings
from tests.support.http import WAIT_S, answer, free_port, group, served

MARK = "unmistakable"
KEY = f"{MARK}-0123456789"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN_ID = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
CLOCK_NS = 5_000_000
"""By how much two clocks of one machine may differ."""


@dataclass
class Collector:
    """A receiver of OTLP over HTTP.

    Attributes:
        statuses: of the next answers; then it takes everything.
    """

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    may_answer: threading.Event = field(default_factory=threading.Event)

    def take(self, path: str, body: bytes) -> int:
        assert path == "/v1/traces"
        with self.changed:
            self.bodies.append(body)
            status = self.statuses.pop(0) if self.statuses else 200
            self.changed.notify_all()
        self.may_answer.wait(WAIT_S)
        return status

    def wait_for(self, num_bodies: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.bodies) >= num_bodies, WAIT_S)

    @property
    def requests(self) -> list[ExportTraceServiceRequest]:
        return [ExportTraceServiceRequest.FromString(body) for body in self.bodies]

    @property
    def spans(self) -> list[Span]:
        """In the order of their beginnings."""
        spans = [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return sorted(spans, key=lambda span: span.start_time_unix_nano)

    @property
    def resource(self) -> dict[str, Any]:
        return values(self.requests[0].resource_spans[0].resource.attributes)

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


def values(attributes: Sequence[KeyValue]) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "") for each in attributes}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("OTEL_", "FASTAPI_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A running collector, named by OpenTelemetry's variable."""
    made = Collector()
    made.may_answer.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the library's name
            status = made.take(self.path, self.rfile.read(int(self.headers["Content-Length"])))
            with contextlib.suppress(BrokenPipeError):  # a sender that has given up
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, *_args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
    yield made
    made.may_answer.set()
    server.shutdown()
    thread.join()
    server.server_close()


def send(url: str, *groups: Any, path: str = "/score", **headers: str) -> httpx.Response:
    return httpx.post(f"{url}{path}", json={"groups": groups}, headers=headers, timeout=WAIT_S)


# --- exports ----------------------------------------------------------------------------------------


def test_a_trace_of_a_request(collector: Collector) -> None:
    headers = {"traceparent": TRACEPARENT, "X-Request-ID": "r1", "X-Run-ID": "grpo-7"}
    with served(tracing=True) as url:
        assert send(url, group(answer(), answer(), "{"), **headers).status_code == 200
    root, *children = collector.spans
    assert root.name == "POST /score"
    assert root.kind == Span.SPAN_KIND_SERVER
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    assert values(root.attributes) == {
        "http.request.method": "POST",
        "http.route": "/score",
        "http.response.status_code": 200,
        "shopr1.request_id": "r1",
        "shopr1.run": "grpo-7",
        "shopr1.num_groups": 1,
        "shopr1.num_rollouts": 3,
    }
    assert root.status.code == Status.STATUS_CODE_UNSET
    assert [child.name for child in children] == ["prepare", "queue", "engine"]
    assert {(child.trace_id, child.parent_span_id) for child in children} == {(root.trace_id, root.span_id)}
    # A prompt of 4 characters and two answers; what is no JSON is not measured.
    sizes = {"shopr1.num_groups": 1, "shopr1.num_tokens": 4 + 2 * len(answer())}
    assert [values(child.attributes) for child in children] == [{}, {}, sizes]


def test_a_span_of_a_group_without_rollouts_says_so(collector: Collector) -> None:
    with served(tracing=True) as url:
        assert send(url, group()).status_code == 200
    sizes = values(collector.named("POST /score")[0].attributes)
    assert (sizes["shopr1.num_groups"], sizes["shopr1.num_rollouts"]) == (1, 0)


def test_spans_lie_one_behind_the_other_within_the_request(collector: Collector) -> None:
    with served(tracing=True) as url:
        send(url, group(answer()))
    root, prepare, queue, engine = collector.spans
    times = [
        root.start_time_unix_nano,
        prepare.start_time_unix_nano,
        prepare.end_time_unix_nano,
        queue.start_time_unix_nano,
        queue.end_time_unix_nano,
        engine.start_time_unix_nano,
        engine.end_time_unix_nano,
        root.end_time_unix_nano,
    ]
    assert all(later - earlier > -CLOCK_NS for earlier, later in itertools.pairwise(times))
    assert root.end_time_unix_nano > root.start_time_unix_nano


def test_each_request_of_a_batch_has_the_batch_in_its_trace(collector: Collector) -> None:
    has_begun, may_go_on = threading.Event(), threading.Event()

    def hold() -> None:
        has_begun.set()
        assert may_go_on.wait(WAIT_S)

    with served(FakePolicy(before_scoring=hold), tracing=True) as url, ThreadPoolExecutor() as pool:
        first = pool.submit(send, url, group(answer(), prompt="first"))
        assert has_begun.wait(WAIT_S)
        others = [pool.submit(send, url, group(answer(), prompt=prompt)) for prompt in ("1", "22")]
        # They wait together for the first to be done, and are then measured together.
        while queued_tokens(url) < 3 + 2 * len(answer()):
            pass
        may_go_on.set()
        assert [asked.result().status_code for asked in (first, *others)] == [200] * 3
    first_one, one, other = collector.named("engine")
    both = {"shopr1.num_groups": 2, "shopr1.num_tokens": 3 + 2 * len(answer())}
    alone = {"shopr1.num_groups": 1, "shopr1.num_tokens": 5 + len(answer())}
    assert [values(span.attributes) for span in (first_one, one, other)] == [alone, both, both]
    assert len({first_one.trace_id, one.trace_id, other.trace_id}) == 3
    assert abs(one.start_time_unix_nano - other.start_time_unix_nano) < CLOCK_NS
    assert abs(one.end_time_unix_nano - other.end_time_unix_nano) < CLOCK_NS


def queued_tokens(url: str) -> float:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=WAIT_S).text)
    return sum(s.value for family in families for s in family.samples if s.name == "shopr1_queue_tokens")


def test_groups_that_are_measured_apart_have_spans_apart(collector: Collector) -> None:
    with served(tracing=True, deterministic=True) as url:
        send(url, group(answer(), prompt="1"), group("nothing to measure"), group(answer(), prompt="22"))
    sizes = [values(span.attributes) for span in collector.named("engine")]
    assert sizes == [
        {"shopr1.num_groups": 1, "shopr1.num_tokens": len(prompt) + len(answer())} for prompt in ("1", "22")
    ]
    assert len(collector.named("queue")) == 2


def test_a_request_that_is_dropped_from_the_queue_has_no_engine_span(collector: Collector) -> None:
    has_begun, may_go_on = threading.Event(), threading.Event()

    def hold() -> None:
        has_begun.set()
        assert may_go_on.wait(WAIT_S)

    with served(FakePolicy(before_scoring=hold), tracing=True) as url, ThreadPoolExecutor() as pool:
        first = pool.submit(send, url, group(answer(), prompt="first"))
        assert has_begun.wait(WAIT_S)
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port)) as connection:
            connection.sendall(raw_request(group(answer())))
            while queued_tokens(url) == 0:
                pass
        # The client has disconnected, and its groups are dropped from the queue.
        while queued_tokens(url) > 0:
            pass
        may_go_on.set()
        assert first.result().status_code == 200
    spans = [span for span in collector.spans if span.trace_id.hex() == TRACE_ID]
    assert [span.name for span in spans] == ["POST /score", "prepare", "queue"]
    assert values(spans[0].attributes)["http.response.status_code"] == 499


def raw_request(*groups: Any) -> bytes:
    body = json.dumps({"groups": groups})
    lines = [
        "POST /score HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"traceparent: {TRACEPARENT}",
    ]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", body]).encode()


def test_a_client_that_does_not_trace_gets_a_trace_of_its_own(collector: Collector) -> None:
    with served(tracing=True) as url:
        send(url, group(answer()))
        send(url, group(answer()), traceparent="no traceparent")
    roots = collector.named("POST /score")
    assert [root.parent_span_id for root in roots] == [b"", b""]
    assert len({root.trace_id for root in roots}) == 2


def test_traces_that_the_client_does_not_sample_are_not_sent(collector: Collector) -> None:
    with served(tracing=True) as url:
        send(url, group(answer()), traceparent=TRACEPARENT.removesuffix("01") + "00")
        httpx.get(f"{url}/info", timeout=WAIT_S)
    assert [span.name for span in collector.spans] == ["GET /info"]


class Failing(FakePolicy):
    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        raise RuntimeError(MARK)


def test_failures_have_a_status_and_no_text(collector: Collector) -> None:
    marked = group(answer({"type": MARK}, MARK), truth={"type": "click", "name": MARK}, prompt=MARK)
    with served(Failing(), tracing=True) as url:
        assert send(url, marked).status_code == 500
        assert send(url, {**marked, MARK: MARK}).status_code == 422
        httpx.get(f"{url}/{MARK}?{MARK}={MARK}", timeout=WAIT_S)
        httpx.request(MARK, f"{url}/score", timeout=WAIT_S)
    roots = [span for span in collector.spans if not span.parent_span_id]
    assert [(root.name, root.status.code) for root in roots] == [
        ("POST /score", Status.STATUS_CODE_ERROR),
        ("POST /score", Status.STATUS_CODE_UNSET),
        ("GET", Status.STATUS_CODE_UNSET),
        ("HTTP /score", Status.STATUS_CODE_UNSET),
    ]
    statuses = [values(root.attributes)["http.response.status_code"] for root in roots]
    assert statuses == [500, 422, 404, 405]
    # The engine's span ends with its failure.
    assert len(collector.named("engine")) == 1
    assert not any(MARK.encode() in body for body in collector.bodies)


def test_keys_are_in_no_span(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    # This variable makes FastAPI trace each URL.
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    with served(tracing=True, api_keys=(KEY,)) as url:
        for path in (f"/key/{KEY}/score", f"/score?api_key={KEY}", f"/key/{KEY}x/score", f"/key/{KEY}"):
            send(url, group(answer()), path=path, Authorization="Basic eHg6eXk=")
        send(url, group(answer()), Authorization=f"Bearer {KEY}")
    names = [span.name for span in collector.spans if not span.parent_span_id]
    assert names == ["POST /score", "POST /score", "POST", "POST", "POST /score"]
    assert not any(KEY.encode() in body for body in collector.bodies)


def test_machines_that_ask_all_the_time_are_not_traced(collector: Collector) -> None:
    with served(tracing=True) as url:
        for path in ("/health/live", "/health/ready", "/metrics", "/recipes/shop_r1"):
            httpx.get(f"{url}{path}", timeout=WAIT_S)
    assert [span.name for span in collector.spans] == ["GET /recipes/{name}"]


# --- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "shopr1"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=other,a=b"}, "other"),
    ],
)
def test_the_name_of_the_service(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with served(tracing=True) as url:
        httpx.get(f"{url}/info", timeout=WAIT_S)
    assert collector.resource["service.name"] == name
    assert collector.resource["service.version"] == __version__


def test_an_invalid_variable_is_reported_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "-1")
    with pytest.raises(SettingsError, match=r"tracing: OpenTelemetry refuses .* must be positive"):
        create_app(Settings(tracing=True), LocalEngine.opener(FakePolicy))


def test_without_the_extra_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "shopr1_service.monitoring.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"sdk.trace is missing\): pip install 'shopr1\[otel\]'"):
        create_app(Settings(tracing=True), LocalEngine.opener(FakePolicy))


def test_without_tracing_opentelemetry_is_not_imported() -> None:
    program = (
        "import sys; from shopr1_service.server.app import create_app; "
        "from shopr1_service.policy.fake import FakePolicy; "
        "from shopr1_service.scheduling.local_engine import LocalEngine; "
        "from shopr1_service.settings import Settings; "
        "create_app(Settings(), LocalEngine.opener(FakePolicy)); "
        "names = ('shopr1_service.monitoring.tracing', 'opentelemetry.sdk', 'opentelemetry.exporter'); "
        "sys.exit(any(name in sys.modules for name in names))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- a collector that is not there ------------------------------------------------------------------


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Level and package of each log line about tracing."""
    ours = [each for each in caplog.records if each.name.startswith(("opentelemetry", tracing.__name__))]
    return [f"{each.levelname} {each.name.split('.')[0]}" for each in ours]


def test_requests_do_not_wait_for_a_collector_that_hangs(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    collector.may_answer.clear()
    with served(tracing=True) as url:
        send(url, group(answer()))
        collector.wait_for(1)
        # It holds the first spans. Nothing lets go of them before all these are answered.
        answers = [send(url, group(answer(), prompt=f"p{i}")) for i in range(20)]
        collector.may_answer.set()
    assert {answered.status_code for answered in answers} == {200}
    assert len(collector.named("POST /score")) == 21


def test_the_end_does_not_wait_for_a_collector_that_hangs(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "_CLOSE_S", 0.1)
    collector.may_answer.clear()
    with served(tracing=True) as url:
        send(url, group(answer()))
    # The collector has not answered yet, and the service has ended all the same.
    assert not collector.may_answer.is_set()
    collector.wait_for(1)


def test_a_dead_collector_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")  # it is full at once, which would be logged as well
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    with served(tracing=True) as url:
        answers = [send(url, group(answer(), prompt=f"p{i}")) for i in range(20)]
    assert {answered.status_code for answered in answers} == {200}
    assert [line.split()[1] for line in logged(caplog)] == ["opentelemetry"]


def test_the_end_of_an_outage_is_logged_and_the_next_one_too(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    collector.statuses = [400, 400, 200, 200, 400]
    tracer = open_tracer()
    for i in range(5):
        tracer.start_request("GET", {}).end("GET", "", 200, {})
        collector.wait_for(i + 1)  # each is sent alone
    tracer.close()
    assert logged(caplog) == ["ERROR opentelemetry", "INFO shopr1_service", "ERROR opentelemetry"]
