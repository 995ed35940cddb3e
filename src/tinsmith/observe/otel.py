"""Spans as the OpenTelemetry SDK makes and sends them: OTLP over HTTP, in batches, from a thread of its own.

The only module that imports it. A collector that is away costs nothing but its spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, get_current_span, use_span
from opentelemetry.trace import set_span_in_context as within
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tinsmith import __version__
from tinsmith.config import Settings
from tinsmith.observe.tracing import META, PLACE
from tinsmith.store.rows import OpRow
from tinsmith.types import OpId

TRACES_PATH = "/v1/traces"
MAX_SHARED = 4096  # ops whose pass is remembered until they are recorded
_W3C = TraceContextTextMapPropagator()


class Asked:
    """See `tracing.Asked`."""

    def __init__(self, span: Span, method: str) -> None:
        self._span, self._method = span, method
        self.is_kept = True

    def handed_on(self) -> None:
        self.is_kept = False

    def answered(self, status: int, route: str, tenant: str) -> None:
        if route:
            self._span.update_name(f"{self._method} {route}")
            self._span.set_attribute("http.route", route)
        if tenant:
            self._span.set_attribute("tinsmith.tenant", tenant)
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))


class Spans:
    """All spans of this process. From any thread."""

    def __init__(self, settings: Settings, process: str, exporter: SpanExporter | None = None) -> None:
        resource = {
            "service.name": "tinsmith",
            "service.version": __version__,
            "service.instance.id": process,
        }
        self._provider = TracerProvider(
            resource=Resource.create(resource),
            sampler=ParentBased(TraceIdRatioBased(settings.trace_share)),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter or _exporter(settings.otlp_endpoint)))
        self._tracer = self._provider.get_tracer("tinsmith", __version__)
        self._shared: dict[OpId, SpanContext] = {}  # the pass of each op that isn't recorded yet

    @contextmanager
    def request(self, method: str, path: str, traceparent: str, request_id: str) -> Iterator[Asked]:
        """Around the answer to an HTTP request; below the client's span, if it named one."""
        attributes = {"http.request.method": method, "url.path": path, "tinsmith.request_id": request_id}
        above = _place(traceparent)
        span = self._tracer.start_span(method, above, kind=SpanKind.SERVER, attributes=attributes)
        asked = Asked(span, method)
        before = PLACE.set(_written(span))
        try:
            with use_span(span, record_exception=False):
                yield asked
        finally:
            PLACE.reset(before)
            if asked.is_kept:  # one that never ends is never sent
                span.end()

    def op(self, op: OpRow, outcome: str, code: str, now: float) -> None:
        above = _place(op.meta[META])
        about: dict[str, str] = {
            "tinsmith.op_id": op.id,
            "tinsmith.kind": op.kind.value,
            "tinsmith.tenant_id": op.tenant_id,
        }
        if op.run_id is not None:
            about["tinsmith.run_id"] = op.run_id
        if op.sampler_id is not None:
            about["tinsmith.sampler_id"] = op.sampler_id
        started_at = op.started_at or now
        self._tracer.start_span("queue", above, attributes=about, start_time=_ns(op.created_at)).end(_ns(started_at))
        shared = self._shared.pop(op.id, None)
        links = [] if shared is None else [Link(shared)]
        about |= {"tinsmith.outcome": outcome, "tinsmith.attempts": str(op.attempts)}
        span = self._tracer.start_span(op.kind.value, above, attributes=about, links=links, start_time=_ns(started_at))
        if code:
            span.set_status(Status(StatusCode.ERROR, code))
        span.end(_ns(now))

    def computed(self, ops: Sequence[OpRow], began_at: float, ended_at: float, counts: Mapping[str, int]) -> None:
        """A pass belongs to nobody's trace: it links to the requests that share it, and they to it."""
        contexts = [get_current_span(_place(op.meta[META])).get_span_context() for op in ops]
        links = [Link(context, {"tinsmith.op_id": op.id}) for op, context in zip(ops, contexts, strict=True)]
        attributes = {f"tinsmith.{name}": count for name, count in counts.items()}
        span = self._tracer.start_span("pass", Context(), attributes=attributes, links=links, start_time=_ns(began_at))
        span.end(_ns(ended_at))
        if len(self._shared) > MAX_SHARED:
            self._shared.clear()
        self._shared |= dict.fromkeys((op.id for op in ops), span.get_span_context())

    def snapshot(self, run_id: str, tenant_id: str, began_at: float, ended_at: float, num_bytes: int) -> None:
        attributes: dict[str, str | int] = {
            "tinsmith.run_id": run_id,
            "tinsmith.tenant_id": tenant_id,
            "tinsmith.bytes": num_bytes,
        }
        span = self._tracer.start_span("snapshot", Context(), attributes=attributes, start_time=_ns(began_at))
        span.end(_ns(ended_at))

    def stop(self) -> None:
        self._provider.shutdown()


def _exporter(endpoint: str) -> SpanExporter:
    base = endpoint.rstrip("/")
    return OTLPSpanExporter(base if base.endswith(TRACES_PATH) else base + TRACES_PATH)


def _place(traceparent: str) -> Context:
    """Below the span that is named; a trace of its own, if none is."""
    return _W3C.extract({META: traceparent}, Context())


def _written(span: Span) -> str | None:
    """Where a span is, for others to hang theirs below; None if it is not to be kept."""
    carrier: dict[str, str] = {}
    if span.is_recording():
        _W3C.inject(carrier, within(span, Context()))
    return carrier.get(META)


def _ns(unix_s: float) -> int:
    return int(unix_s * 1e9)
