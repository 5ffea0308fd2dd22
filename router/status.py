"""A router's account of itself and of the engines that it knows, for gRPC's Status and for the status page."""

from __future__ import annotations

import time

from splitserve import __version__
from splitserve.router.dispatcher import Dispatcher
from splitserve.router.engines import Engine
from splitserve.router.traces import Latency
from splitserve.router.v1 import splitserve_pb2 as pb


class Status:
    """Of the router of `dispatcher`, from now on."""

    def __init__(self, cluster: str, model: str, dispatcher: Dispatcher) -> None:
        self._cluster, self._model, self._dispatcher = cluster, model, dispatcher
        self._started_at = time.monotonic()

    def now(self) -> pb.StatusResponse:
        lately = self._dispatcher.recent.latencies()
        return pb.StatusResponse(
            cluster=self._cluster,
            version=__version__,
            model=self._model,
            engines=[_engine(engine) for engine in self._dispatcher.engines],
            active_requests=self._dispatcher.admission.active,
            queued_requests=self._dispatcher.admission.queued,
            uptime_s=time.monotonic() - self._started_at,
            recent_requests=lately.requests,
            ttft=_latency(lately.ttft),
            tpot=_latency(lately.tpot),
        )


def _engine(engine: Engine) -> pb.Engine:
    member = engine.member
    known = pb.Engine(
        name=member.engine,
        role=member.role,
        incarnation=member.incarnation,
        state=_state(engine),
        last_seen_s=time.monotonic() - engine.last_seen,
    )
    if (stats := engine.stats) is not None:
        known.MergeFrom(
            pb.Engine(
                running=stats.running,
                waiting=stats.waiting,
                free_kv_tokens=stats.free_tokens,
                total_kv_tokens=stats.total_tokens,
                preemptions=stats.preemptions,
                slots=stats.slots,
                queried_tokens=stats.counts.queried_tokens,
                cached_tokens=stats.counts.cached_tokens,
                prompt_tokens=stats.counts.prompt_tokens,
                output_tokens=stats.counts.output_tokens,
                decode_steps=stats.counts.decode_steps,
            )
        )
    return known


def _state(engine: Engine) -> pb.EngineState.ValueType:
    if engine.ready:
        return pb.ENGINE_STATE_DRAINING if engine.member.draining else pb.ENGINE_STATE_READY
    return pb.ENGINE_STATE_STARTING if engine.stats is None else pb.ENGINE_STATE_SILENT


def _latency(latency: Latency) -> pb.Latency:
    return pb.Latency(p50_s=latency.p50_s, p99_s=latency.p99_s)
