"""What a router counts and measures, for Prometheus. Names and units are those of docs/observability.md.

No label takes a value from a request: their number is bounded by the code and the topology.
"""

from __future__ import annotations

from asyncio import CancelledError
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Literal, get_args

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from splitserve.cluster.errors import SplitserveError
from splitserve.router.admission import Admission
from splitserve.router.engine_metrics import EngineCollector
from splitserve.router.engines import Engine

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the number of series, and nobody graphs them

STATUS_NAMES = frozenset(grpc.StatusCode.__members__)
OUTCOMES = ("OK", "CANCELLED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "ABORTED", "INTERNAL")
AttemptReason = Literal["new", "busy", "engine_lost", "failed"]

TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
PHASE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


class RouterMetrics:
    """All metrics of one router, engines included. What it is made with is looked at when somebody collects."""

    def __init__(self, admission: Admission, engines: Iterable[Engine], ready: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(EngineCollector(engines))
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a request.", TOKEN_SECONDS
        )
        self.ttft = self._histogram("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self.tpot = self._histogram(
            "time_per_output_token_seconds", "Mean time of a request's tokens after the first.", TOKEN_SECONDS
        )
        self.queue = self._histogram("queue_seconds", "From arrival until decode has granted room.")
        self.prefill_queue = self._histogram("prefill_queue_seconds", "From there until prefill begins.")
        self.prefill = self._histogram("prefill_seconds", "Prefill's computing, as its engine measures it.")
        self.kv_transfer = self._histogram("kv_transfer_seconds", "From the first token until decode takes over.")
        self.decode = self._histogram("decode_seconds", "From there to the last token.")
        self.total = self._histogram("request_seconds", "From arrival to the end of a request that was answered.")
        self.prompt = self._histogram("request_prompt_tokens", "Prompt tokens of requests that were answered.", TOKENS)
        self.output = self._histogram("request_output_tokens", "Tokens of their answers, all samples.", TOKENS)
        self.cached = self._counter("cached_prompt_tokens", "Prompt tokens that prefill did not compute again.")
        self.requests = self._counter("requests", "Requests that are over, by gRPC status.", "code")
        self.calls = self._counter("calls", "Calls over gRPC, or HTTP, by status.", "surface", "method", "code")
        attempts = self._counter(
            "attempts", "Times that engines were asked to take a request, and why they were.", "reason"
        )
        # Series that begin above 0 have no rate at first.
        self.attempts = {reason: attempts.labels(reason) for reason in get_args(AttemptReason)}
        for code in OUTCOMES:
            self.requests.labels(code)
        self._info = Info("splitserve_build", "What runs here.", registry=self.registry)
        self._gauge("ready", "1 while a request could be placed: each pool has an engine that is ready.", ready)
        self._gauge("requests_active", "Requests admitted.", lambda: admission.active)
        self._gauge("requests_queued", "Requests that wait for admission or an engine.", lambda: admission.queued)
        self._gauge("requests_active_limit", "router.max_active.", lambda: admission.max_active)
        self._gauge("requests_queued_limit", "router.max_queue.", lambda: admission.max_queue)

    def describe(self, *, version: str, cluster: str, model: str) -> None:
        """Name what runs here."""
        self._info.info({"version": version, "cluster": cluster, "model": model})

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...] = PHASE_SECONDS) -> LeanHistogram:
        histogram = LeanHistogram(f"splitserve_{name}", text, bounds)
        self.registry.register(histogram)
        return histogram

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"splitserve_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, look: Callable[[], float]) -> None:
        Gauge(f"splitserve_{name}", text, registry=self.registry).set_function(look)


@contextmanager
def outcome(count: Callable[[str], None]) -> Iterator[None]:
    """Call `count` with the gRPC status that what is done inside ends with."""
    code = "INTERNAL"
    try:
        yield
        code = "OK"
    except SplitserveError as error:
        code = error.code if error.code in STATUS_NAMES else "INTERNAL"
        raise
    except CancelledError:
        code = "CANCELLED"
        raise
    finally:
        count(code)


class LeanHistogram(Collector):
    """A histogram whose `observe` takes a fifth of the time that the library's takes. For one thread that observes."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets, self._sum)
