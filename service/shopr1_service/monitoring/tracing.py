"""OpenTelemetry traces of requests, sent by OTLP over HTTP. Imported only where `tracing` is set.

    POST /score                      the whole request; its parent is the client's span (W3C traceparent)
    ├── prepare                      parsing, rules, tokenising
    ├── queue                        waiting for the engine
    └── engine                       forward and head

The engine computes groups of several requests in one pass. Each request gets its own span of it, with the
times and the sizes of the whole batch. Links between traces would say the same, but most tools neither draw
nor follow them, and a sampler that keeps one request would lose the engine's span to another.

OpenTelemetry's instrumentations of FastAPI and ASGI are not used: they record the URL before the key is taken
out of it, and the texts of exceptions.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from asgi_correlation_id import correlation_id
from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode

from shopr1_service import __version__
from shopr1_service.errors import SettingsError
from shopr1_service.monitoring.logs import current_run

logger = logging.getLogger(__name__)

_FAILED = 500
"""Statuses from this one on are errors of the service."""
_CLOSE_S = 5.0
"""Seconds that the end of the service waits for a collector."""
_NOISY_LOGGERS = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.sdk._shared_internal",
)
"""Loggers that write a line for each try while a collector is down."""


class Tracer:
    """Makes spans and sends them from its own thread.

    OpenTelemetry's variables configure the endpoint (`OTEL_EXPORTER_OTLP_ENDPOINT`), sampling
    (`OTEL_TRACES_SAMPLER`) and the service's name (`OTEL_SERVICE_NAME`, by default `shopr1`).

    Raises:
        SettingsError: one of them is not valid.
    """

    def __init__(self) -> None:
        try:
            self._exporter = _Exporter()
            processor = BatchSpanProcessor(self._exporter)
        except (ValueError, RuntimeError, OSError) as error:
            raise SettingsError(f"tracing: OpenTelemetry refuses its variables: {error}") from error
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("shopr1", __version__)
        for name in _NOISY_LOGGERS:
            logging.getLogger(name).addFilter(self._exporter.starts_outage)

    def start_request(self, method: str, headers: Mapping[str, str]) -> "RequestTrace":
        """Start the trace of a request, or continue the client's where the headers name one."""
        context = propagate.extract(headers)
        span = self._tracer.start_span(_span_name(method), context=context, kind=SpanKind.SERVER)
        return RequestTrace(self._tracer, span)

    def close(self) -> None:
        """Send the remaining spans, as far as the collector accepts them in time."""
        sending = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        sending.join(_CLOSE_S)
        if sending.is_alive():
            self._exporter.shutdown()
        for name in _NOISY_LOGGERS:
            logging.getLogger(name).removeFilter(self._exporter.starts_outage)


class RequestTrace:
    """The spans of one request (a `spans.Trace`)."""

    def __init__(self, tracer: trace.Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._context = trace.set_span_in_context(span)

    def add(self, name: str, start_s: float, end_s: float, **attributes: int) -> None:
        """Add a finished child span. Times are on the clock of `time.perf_counter`."""
        span = self._tracer.start_span(name, context=self._context, start_time=_wall_ns(start_s))
        span.set_attributes(_named(attributes))
        span.end(_wall_ns(end_s))

    def end(self, method: str, route: str, status: int, sizes: Mapping[str, int]) -> None:
        """End the request's own span.

        Args:
            route: the route's template, which names the span; empty if there is none.
            sizes: how many groups and rollouts it wants scored.
        """
        self._span.update_name(f"{_span_name(method)} {route}".rstrip())
        http = {"http.request.method": _span_name(method), "http.route": route}
        origin = _named({"request_id": correlation_id.get(), "run": current_run.get(), **sizes})
        known = {name: value for name, value in (http | origin).items() if value not in ("", None)}
        self._span.set_attributes(known)
        self._span.set_attribute("http.response.status_code", status)
        if status >= _FAILED:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


def _span_name(method: str) -> str:
    """OpenTelemetry's word for a method that is none of HTTP's own."""
    return method if method.isupper() else "HTTP"


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"shopr1.{name}": value for name, value in attributes.items()}


def _wall_ns(perf_counter_s: float) -> int:
    """A time of `time.perf_counter` in ns since 1970."""
    return time.time_ns() - int((time.perf_counter() - perf_counter_s) * 1e9)


def _resource() -> Resource:
    # Attributes that are passed here take precedence over the variables.
    name = OTELResourceDetector().detect().attributes.get(SERVICE_NAME, "shopr1")
    return Resource.create({SERVICE_NAME: name, SERVICE_VERSION: __version__})


class _Exporter(OTLPSpanExporter):
    """OTLP exporter that logs the beginning and the end of an outage, once each."""

    _is_collector_down = False
    _is_closed = False

    def starts_outage(self, _record: logging.LogRecord) -> bool:
        """Logging filter: lets the first line of each outage through, which gives the reason."""
        is_first = not self._is_collector_down
        self._is_collector_down = True
        return is_first

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        if result is SpanExportResult.SUCCESS and self._is_collector_down:
            self._is_collector_down = False
            logger.info("the collector accepts spans again")
        return result

    def shutdown(self) -> None:
        """Abort also an export in progress. OpenTelemetry warns of a second call."""
        if not self._is_closed:
            self._is_closed = True
            super().shutdown()  # type: ignore[no-untyped-call]
