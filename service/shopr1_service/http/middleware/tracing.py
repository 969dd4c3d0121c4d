"""OpenTelemetry: a trace of each request, sent by OTLP over HTTP. Imported only where `tracing` is set.

    POST /score                      the whole request; its parent is the client's span (W3C traceparent)
    ├── prepare                      parsing, rules, tokenising
    ├── queue                        waiting for the engine
    └── engine                       forward and head

The engine measures groups of several requests together. Each of them gets a span of its own for it, with the
times and the sizes of the whole batch: links between traces would say the same, but most tools neither draw
them nor follow them, and a sampler that keeps one request would lose the engine's span to another.

Spans hold no URL: keys may stand in it. FastAPI's own instrumentation and OpenTelemetry's for ASGI write it
before the key is taken out, and that is why neither is used.
"""

import logging
import threading
import time
from collections.abc import Sequence

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shopr1_service import __version__
from shopr1_service.errors import SettingsError
from shopr1_service.http.middleware.run_id import run_of
from shopr1_service.http.request_context import KNOWN_METHODS, request_id_of, sizes_of
from shopr1_service.monitoring.spans import current_trace

logger = logging.getLogger(__name__)

_UNTRACED = ("/health/", "/metrics")
"""Asked every few seconds, by machines."""
_FAILED = 500
"""From this status on the service is at fault."""
_CLOSE_S = 5.0
"""How long the end of the service waits for a collector."""
_TALKATIVE = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal")
"""Loggers that write a line for each try while a collector is away."""


class Tracer:
    """Makes spans and sends them, on a thread of its own.

    OpenTelemetry's variables say where to (`OTEL_EXPORTER_OTLP_ENDPOINT`), how many (`OTEL_TRACES_SAMPLER`)
    and under which name (`OTEL_SERVICE_NAME`, by default `shopr1`).

    Raises:
        SettingsError: one of them makes no sense.
    """

    def __init__(self) -> None:
        self._outage = _Outage()
        try:
            self._exporter = _Exporter(OTLPSpanExporter(), self._outage)
            sender = BatchSpanProcessor(self._exporter)
        except (ValueError, RuntimeError, OSError) as error:
            raise SettingsError(f"tracing: OpenTelemetry refuses its variables: {error}") from error
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(sender)
        self._tracer = self._provider.get_tracer("shopr1", __version__)
        for name in _TALKATIVE:
            logging.getLogger(name).addFilter(self._outage)

    def begin(self, name: str, headers: Headers) -> "_RequestTrace":
        """The trace of a request: the client's, where it sent one."""
        context = propagate.extract(headers)
        span = self._tracer.start_span(name, context=context, kind=SpanKind.SERVER)
        return _RequestTrace(self._tracer, span)

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """ASGI middleware that traces every request."""
        return _Tracing(app, self)

    def close(self) -> None:
        """Send what is left, as far as the collector takes it in time."""
        sending = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        sending.join(_CLOSE_S)
        if sending.is_alive():
            self._exporter.give_up()
        for name in _TALKATIVE:
            logging.getLogger(name).removeFilter(self._outage)


class _RequestTrace:
    """The spans of one request (a `spans.Trace`)."""

    def __init__(self, tracer: trace.Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._context: Context = trace.set_span_in_context(span)

    def add(self, name: str, start_s: float, end_s: float, **attributes: int) -> None:
        span = self._tracer.start_span(name, context=self._context, start_time=_wall_ns(start_s))
        span.set_attributes({f"shopr1.{key}": value for key, value in attributes.items()})
        span.end(_wall_ns(end_s))

    def end(self, method: str, route: str, status: int, attributes: dict[str, str | int]) -> None:
        """End the request's own span.

        Args:
            route: the route's template, which names the span; empty if there is none.
        """
        self._span.update_name(f"{method} {route}".rstrip())
        self._span.set_attributes(
            {"http.request.method": method, "http.response.status_code": status, **attributes}
        )
        if route:
            self._span.set_attribute("http.route", route)
        if status >= _FAILED:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class _Tracing:
    """ASGI middleware: the outermost, so that a trace is as long as the client waits."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_UNTRACED):
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in KNOWN_METHODS else "HTTP"
        status = 500

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        request_trace = self._tracer.begin(method, Headers(scope=scope))
        token = current_trace.set(request_trace)
        try:
            await self._app(scope, receive, send_noting_status)
        finally:
            current_trace.reset(token)
            request_trace.end(method, getattr(scope.get("route"), "path", ""), status, _attributes(scope))


def _attributes(scope: Scope) -> dict[str, str | int]:
    """Whose request it is, and how large."""
    fields: dict[str, str | int] = {"request_id": request_id_of(scope), "run": run_of(scope)}
    fields |= sizes_of(scope)
    return {f"shopr1.{name}": value for name, value in fields.items() if value != ""}


def _wall_ns(perf_counter_s: float) -> int:
    """A time of `time.perf_counter` in ns since 1970."""
    return time.time_ns() - int((time.perf_counter() - perf_counter_s) * 1e9)


def _resource() -> Resource:
    # What is given here would win over the variables.
    name = OTELResourceDetector().detect().attributes.get(SERVICE_NAME, "shopr1")
    return Resource.create({SERVICE_NAME: name, SERVICE_VERSION: __version__})


class _Outage(logging.Filter):
    """Lets through one line for each time that the collector goes away: the first, which says why."""

    def __init__(self) -> None:
        super().__init__()
        self.is_told = False

    def filter(self, record: logging.LogRecord) -> bool:
        is_news = not self.is_told
        self.is_told = True
        return is_news


class _Exporter(SpanExporter):
    """OTLP; knows when an outage is over."""

    def __init__(self, exporter: OTLPSpanExporter, outage: _Outage) -> None:
        self._exporter = exporter
        self._outage = outage
        self._is_closed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS and self._outage.is_told:
            self._outage.is_told = False
            logger.info("the collector takes spans again")
        return result

    def give_up(self) -> None:
        """End also a try that is under way."""
        if not self._is_closed:
            self._is_closed = True
            self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def shutdown(self) -> None:
        self.give_up()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)
