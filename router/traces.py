"""Requests that are over: where their time went, for Perfetto, and how long the latest took."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from splitserve.cluster.errors import NotFound
from splitserve.router.timeline import Span, Timings

MOST_TRACES, MOST_TIMINGS = 256, 4096
RECENT_S = 60.0


@dataclass(frozen=True)
class RequestTrace:
    """A request that ended with the gRPC status `code`; times in seconds of the monotonic clock.

    `spans` makes its phases: most traces are never looked at.
    """

    request_id: str
    code: str
    began: float
    ended: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    spans: Callable[[], Sequence[Span]]

    @property
    def attributes(self) -> dict[str, str | int]:
        """What there is to say of it; nothing that its client wrote."""
        return {
            "request_id": self.request_id,
            "code": self.code,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
        }


@dataclass(frozen=True)
class Latency:
    """Of requests lately, in seconds."""

    p50_s: float
    p99_s: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Latency:
        if len(values) < 2:
            return cls(sum(values), sum(values))
        percentiles = statistics.quantiles(values, n=100, method="inclusive")
        return cls(percentiles[49], percentiles[98])


@dataclass(frozen=True)
class Latencies:
    requests: int
    ttft: Latency
    tpot: Latency


class RecentRequests:
    """The last requests of a router: traces of MOST_TRACES, and timings of those answered within RECENT_S."""

    def __init__(self) -> None:
        self._traces: deque[RequestTrace] = deque(maxlen=MOST_TRACES)
        self._timings: deque[tuple[float, Timings]] = deque(maxlen=MOST_TIMINGS)

    def add(self, trace: RequestTrace) -> None:
        """Keep where the time of a request went."""
        self._traces.append(trace)

    def answered(self, timings: Timings) -> None:
        """Keep the timings of a request that was answered just now."""
        self._timings.append((time.monotonic(), timings))

    def chrome_trace(self, request_id: str) -> str:
        """JSON for Perfetto, of one request or, for "", all. Raises NotFound when that one is not kept (any more).

        An id may be as OpenAI's clients see it.
        """
        request_id = re.sub("^(chat)?cmpl-", "", request_id)
        traces = [trace for trace in self._traces if request_id in ("", trace.request_id)]
        if request_id and not traces:
            raise NotFound(f"no request {request_id!r:.100} is among the last {MOST_TRACES} of this router")
        return chrome_trace(traces)

    def latencies(self) -> Latencies:
        """Of requests that were answered within RECENT_S."""
        since = time.monotonic() - RECENT_S
        timings = [one for ended, one in self._timings if ended >= since]
        ttft, tpot = [one.ttft_s for one in timings if one.ttft_s], [one.tpot_s for one in timings if one.tpot_s]
        return Latencies(len(timings), Latency.of(ttft), Latency.of(tpot))


def chrome_trace(traces: Sequence[RequestTrace]) -> str:
    """Chrome's trace event format: a process for the router and each engine, and in each a thread for a request."""
    wall = time.time() - time.monotonic()
    processes: dict[str, int] = {}
    events: list[dict[str, object]] = []

    def name(kind: str, value: str, process: int, thread: int) -> None:
        events.append({"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": value}})

    for thread, trace in zip(itertools.count(1), traces):
        whole = Span("request", "", trace.began, trace.ended, trace.attributes)
        seen: set[int] = set()
        for span in (whole, *trace.spans()):
            process = processes.setdefault(span.engine, len(processes) + 1)
            if process not in seen:
                seen.add(process)
                name("thread_name", trace.request_id, process, thread)
            start_us, length_us = (wall + span.start) * 1e6, (span.end - span.start) * 1e6
            place = {"pid": process, "tid": thread, "ts": start_us, "dur": length_us}
            events.append({"ph": "X", "cat": "request", "name": span.name, **place, "args": span.attributes})
    for engine, process in processes.items():
        name("process_name", engine or "router", process, 0)
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})
