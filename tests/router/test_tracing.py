"""OpenTelemetry: the spans of a request, at a collector that is there, slow or gone."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from pydantic import ValidationError

from splitserve.client import AsyncClient
from splitserve.cluster.errors import StartupError
from splitserve.cluster.topology_sections import Tracing
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.service import RouterService
from splitserve.router.timeline import Span
from splitserve.router.traces import RequestTrace
from splitserve.router.tracing import EXPORT_TIMEOUT_S, TraceExport
from splitserve.router.v1 import splitserve_pb2 as pb
from splitserve.router.v1.splitserve_pb2_grpc import SplitServeStub
from tests.ports import free_port
from tests.router.routers import engines_ready, eventually, model_folder, running_router, topology

CALLER_TRACE, CALLER_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"
SECRET = "swordfish"
SPANS = [
    Span("queue", "", 1.0, 1.5, {"attempt": 1}),
    Span("prefill", "prefill/0/0", 1.5, 2.0, {"attempt": 1, "cached_tokens": 4}),
    Span("decode", "decode/0/0", 2.0, 4.0, {"attempt": 1, "lost": "decode/0/0 silent"}),
]
TRACE = RequestTrace("r-1", "UNAVAILABLE", 1.0, 4.5, 8, 4, 9, lambda: SPANS)


def exported(traceparent: str | None = None, sample: float = 1.0) -> dict[str, ReadableSpan]:
    exporter = InMemorySpanExporter()
    settings = Tracing(endpoint="http://127.0.0.1:4317", sample=sample)
    TraceExport(settings, "test", "tiny", SimpleSpanProcessor(exporter)).export(TRACE, traceparent)
    return {span.name: span for span in exporter.get_finished_spans()}


def test_each_phase_is_a_span_of_the_service_that_it_passed_in() -> None:
    spans = exported()
    root = spans["request"]
    assert root.parent is None
    assert {name: span.resource.attributes["service.name"] for name, span in spans.items()} == {
        "request": "splitserve-router",
        "queue": "splitserve-router",
        "prefill": "splitserve-prefill",
        "decode": "splitserve-decode",
    }
    for name in ("queue", "prefill", "decode"):
        parent = spans[name].parent
        assert parent is not None
        assert (parent.span_id, parent.trace_id) == (root.context.span_id, root.context.trace_id)
    assert root.attributes is not None
    assert root.attributes["gen_ai.usage.input_tokens"] == 8
    assert root.status.status_code == spans["decode"].status.status_code == StatusCode.ERROR
    assert root.end_time is not None
    assert root.start_time is not None
    assert root.end_time - root.start_time == pytest.approx(3.5e9, abs=1e6)


def test_a_callers_trace_goes_on() -> None:
    spans = exported(TRACEPARENT)
    parent = spans["request"].parent
    assert parent is not None
    assert f"{parent.span_id:016x}" == CALLER_SPAN
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {CALLER_TRACE}


def test_who_is_not_traced_has_no_spans() -> None:
    assert exported(sample=0.0) == {}
    assert exported(TRACEPARENT, sample=0.0), "its caller says that it is traced"
    assert exported(TRACEPARENT[:-1] + "0") == {}, "its caller says that it is not"


@pytest.mark.parametrize("noise", ["", "00-0-0-01", "x" * 10_000, f"00-{'0' * 32}-{CALLER_SPAN}-01", "ff-é"])
def test_a_traceparent_that_is_none_begins_a_trace(noise: str) -> None:
    assert exported(noise)["request"].parent is None


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:4317", "http://127.0.0.1", "ftp://a:1", "http://a:1/path", "http://:1"]
)
def test_an_endpoint_that_cannot_be_is_refused(endpoint: str) -> None:
    with pytest.raises(ValidationError, match="endpoint"):
        Tracing(endpoint=endpoint)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans after waiting for `open`."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.calls = 0
        self.open = threading.Event()

    def Export(self, request: otlp.ExportTraceServiceRequest, context: Any) -> otlp.ExportTraceServiceResponse:
        self.calls += 1
        self.open.wait(60)
        for resource in request.resource_spans:
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return otlp.ExportTraceServiceResponse()


@contextmanager
def collector(*, slow: bool = False) -> Iterator[tuple[str, Collector]]:
    servicer = Collector()
    if not slow:
        servicer.open.set()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", servicer
    finally:
        servicer.open.set()
        server.stop(0).wait()


async def answered(service: RouterService, cluster: FakeCluster, requests: int) -> list[float]:
    """How long each of `requests` requests took, in seconds."""
    service.set_members(cluster.members)
    took = []
    async with AsyncClient(service.address) as client:
        await engines_ready(client)
        for _ in range(requests):
            began = time.monotonic()
            await client.generate(SECRET, max_tokens=3).result()
            took.append(time.monotonic() - began)
    return took


def test_a_collector_gets_the_spans_of_both_surfaces() -> None:
    async def scenario(endpoint: str) -> None:
        service = RouterService(topology(tracing={"endpoint": endpoint}), model_folder())
        await service.start()
        await answered(service, cluster, 0)
        async with grpc.aio.insecure_channel(service.address) as channel:
            request = pb.GenerateRequest(text=SECRET, sampling=pb.Sampling(max_tokens=2))
            stub: Any = SplitServeStub(channel)
            async for _ in stub.Generate(request, metadata=(("traceparent", TRACEPARENT),)):
                pass
        async with httpx2.AsyncClient() as http:
            url, body = f"http://{service.http_address}/v1/completions", {"prompt": SECRET, "max_tokens": 2}
            await http.post(url, json=body, headers={"traceparent": TRACEPARENT})
        await service.stop()

    with FakeCluster() as cluster, collector() as (endpoint, received):
        asyncio.run(scenario(endpoint))
        assert sorted(span.name for span in received.spans) == sorted(
            ["request", "queue", "prefill queue", "prefill", "KV transfer", "decode"] * 2
        )
    assert {span.trace_id.hex() for span in received.spans} == {CALLER_TRACE}
    roots = [span for span in received.spans if span.name == "request"]
    assert [span.parent_span_id.hex() for span in roots] == [CALLER_SPAN] * 2
    assert SECRET not in str(received.spans)


@pytest.mark.parametrize("gone", [False, True], ids=["slow", "gone"])
def test_a_collector_that_does_not_answer_delays_nothing(gone: bool) -> None:
    async def scenario(endpoint: str) -> None:
        service = RouterService(topology(tracing={"endpoint": endpoint}), model_folder())
        await service.start()
        took = await answered(service, cluster, 120)
        if not gone:
            await eventually(lambda: silent.calls, within_s=10.0)
            took += await answered(service, cluster, 20)
        assert max(took) < EXPORT_TIMEOUT_S / 2, "a request that waits for an export waits for its timeout"
        began = time.monotonic()
        await service.stop()
        assert time.monotonic() - began < 4.0

    with FakeCluster(behaviour=Behaviour(step_s=0.001)) as cluster, collector(slow=True) as (endpoint, silent):
        asyncio.run(scenario(f"http://127.0.0.1:{free_port()}" if gone else endpoint))


def test_without_the_extra_a_router_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "splitserve.router.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartupError, match=r"install splitserve\[otel\]"):
        RouterService(topology(tracing={"endpoint": "http://127.0.0.1:4317"}), model_folder())


def test_without_tracing_none_of_it_is_loaded() -> None:
    async def scenario() -> None:
        async with running_router(cluster) as (service, _):
            assert service.dispatcher._export is None

    with FakeCluster() as cluster:
        asyncio.run(scenario())
