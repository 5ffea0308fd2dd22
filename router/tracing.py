"""Requests as OpenTelemetry traces, sent to a collector by OTLP. Loaded only where it is asked for: the extra `otel`.

A router sends all spans of its requests when they are over, those of their engines too, by its own clock and the
durations that engines report: so workers need no way to the collector, and no two clocks are compared. The spans are
queued, and dropped while the queue is full: a collector that is slow, or gone, keeps no request waiting.
"""

from __future__ import annotations

import asyncio
import threading
import time

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from splitserve import __version__
from splitserve.cluster.topology_sections import Tracing
from splitserve.router.traces import RequestTrace

EXPORT_TIMEOUT_S = 5.0
CLOSE_S = 1.0
MOST_QUEUED, MOST_AT_ONCE = 8192, 512
ATTRIBUTES = {  # by OpenTelemetry's conventions, where it has one
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "code": "rpc.response.status_code",
}


def otlp_processor(settings: Tracing) -> SpanProcessor:
    """What sends spans to the collector at `settings.endpoint`, in a thread of its own."""
    insecure = not settings.endpoint.startswith("https://")
    exporter = OTLPSpanExporter(settings.endpoint, insecure=insecure, timeout=EXPORT_TIMEOUT_S)
    return BatchSpanProcessor(exporter, max_queue_size=MOST_QUEUED, max_export_batch_size=MOST_AT_ONCE)


class TraceExport:
    """Makes spans of requests that are over and gives them to `processor`.

    Each pool is a service of its own. A request whose caller is traced is traced if that says so, others by
    `settings.sample`.
    """

    def __init__(self, settings: Tracing, cluster: str, model: str, processor: SpanProcessor) -> None:
        self._cluster, self._model, self._processor = cluster, model, processor
        self._sampler = ParentBased(TraceIdRatioBased(settings.sample))
        self._tracers: dict[str, Tracer] = {}
        self._propagator = TraceContextTextMapPropagator()

    def export(self, trace: RequestTrace, traceparent: str | None) -> None:
        """Queue the spans of a request, below the span that `traceparent` names."""
        wall = time.time() - time.monotonic()

        def nanoseconds(at: float) -> int:
            return int((wall + at) * 1e9)

        caller = self._propagator.extract({"traceparent": traceparent or ""}, Context())
        attributes = {"gen_ai.request.model": self._model} | _named(trace.attributes)
        began, ended = nanoseconds(trace.began), nanoseconds(trace.ended)
        root = self._tracer("router").start_span("request", caller, SpanKind.SERVER, attributes, start_time=began)
        if root.is_recording():
            within = set_span_in_context(root, Context())
            for span in trace.spans():
                tracer = self._tracer(span.engine.partition("/")[0] or "router")
                named = _named(span.attributes) | ({"splitserve.engine": span.engine} if span.engine else {})
                child = tracer.start_span(span.name, within, attributes=named, start_time=nanoseconds(span.start))
                if "lost" in span.attributes:
                    child.set_status(Status(StatusCode.ERROR, str(span.attributes["lost"])))
                child.end(nanoseconds(span.end))
            if trace.code not in ("OK", "CANCELLED"):
                root.set_status(Status(StatusCode.ERROR, trace.code))
        root.end(ended)

    async def close(self) -> None:
        """Send what is queued, as far as CLOSE_S seconds allow."""
        closing = threading.Thread(target=self._processor.shutdown, name="tracing-shutdown", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, CLOSE_S)

    def _tracer(self, pool: str) -> Tracer:
        if pool not in self._tracers:
            names = {"service.name": f"splitserve-{pool}", "service.namespace": self._cluster}
            provider = TracerProvider(self._sampler, Resource.create(names), shutdown_on_exit=False)
            provider.add_span_processor(self._processor)
            self._tracers[pool] = provider.get_tracer("splitserve", __version__)
        return self._tracers[pool]


def _named(attributes: dict[str, str | int]) -> dict[str, str | int]:
    return {ATTRIBUTES.get(name, f"splitserve.{name}"): value for name, value in attributes.items()}
