"""What engines report of themselves, as Prometheus metrics: made from their last stats when somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from splitserve.cluster.counts import TransferCounts
from splitserve.cluster.messages import EngineStats
from splitserve.router.engines import Engine

LABELS = ("pool", "engine")


@dataclass(frozen=True)
class _Figure:
    """One metric of each engine. A counter's name gets `_total`; it starts anew with each incarnation."""

    kind: type[GaugeMetricFamily] | type[CounterMetricFamily]
    name: str
    help: str
    value: Callable[[EngineStats], float]


GAUGE, COUNTER = GaugeMetricFamily, CounterMetricFamily
FIGURES = (
    _Figure(GAUGE, "engine_running_requests", "Requests that are computed now.", lambda stats: stats.running),
    _Figure(GAUGE, "engine_waiting_requests", "Requests that wait in the engine.", lambda stats: stats.waiting),
    _Figure(GAUGE, "engine_slots", "Sequences that a decode engine computes at once.", lambda stats: stats.slots),
    _Figure(GAUGE, "kv_pages_free", "KV pages that can be handed out, idle cached ones among them.",
            lambda stats: stats.free_tokens // stats.layout.page_size),
    _Figure(GAUGE, "kv_pages", "KV pages in all.", lambda stats: stats.total_tokens // stats.layout.page_size),
    _Figure(GAUGE, "host_tier_used_bytes", "Host memory that holds KV, of one rank.",
            lambda stats: stats.host_tier.used),
    _Figure(GAUGE, "host_tier_bytes", "Host memory there is for KV, of one rank.", lambda stats: stats.host_tier.total),
    _Figure(GAUGE, "kv_staging_used_bytes", "Memory granted to KV that comes in, of one rank.",
            lambda stats: stats.staging.used),
    _Figure(GAUGE, "kv_staging_bytes", "Memory there is for KV that comes in, of one rank.",
            lambda stats: stats.staging.total),
    _Figure(GAUGE, "kv_links_up", "NCCL communicators of a prefill engine's ranks that are up.",
            lambda stats: stats.links_up),
    _Figure(COUNTER, "engine_preemptions", "Sequences that gave up their slot because pages ran out.",
            lambda stats: stats.preemptions),
    _Figure(COUNTER, "engine_prompt_tokens", "Prompt tokens computed.", lambda stats: stats.counts.prompt_tokens),
    _Figure(COUNTER, "engine_output_tokens", "Tokens of answers computed.", lambda stats: stats.counts.output_tokens),
    _Figure(COUNTER, "engine_decode_steps", "Decode steps; output tokens by steps are the mean batch.",
            lambda stats: stats.counts.decode_steps),
    _Figure(COUNTER, "prefix_cache_queried_tokens", "Prompt tokens looked up in the engine's prefix cache.",
            lambda stats: stats.counts.queried_tokens),
    _Figure(COUNTER, "prefix_cache_hit_tokens", "Prompt tokens found there.",
            lambda stats: stats.counts.cached_tokens),
    _Figure(COUNTER, "prefix_cache_fetched_tokens", "Prompt tokens of these that another engine had.",
            lambda stats: stats.counts.fetched_tokens),
)  # fmt: skip


@dataclass(frozen=True)
class _TransferFigure:
    """One counter of each transport of each prefill engine."""

    name: str
    help: str
    value: Callable[[TransferCounts], float]


TRANSFER_FIGURES = (
    _TransferFigure("kv_transfers_started", "KV transfers begun; each rank's share is one.", lambda one: one.started),
    _TransferFigure("kv_transfers_completed", "KV transfers that decode has whole.", lambda one: one.completed),
    _TransferFigure("kv_transfers_failed", "KV transfers that failed.", lambda one: one.failed),
    _TransferFigure("kv_transfers_cancelled", "KV transfers whose request ended.", lambda one: one.cancelled),
    _TransferFigure("kv_transfer_bytes", "Bytes of KV sent, what was sent again included.", lambda one: one.bytes),
)


class EngineCollector(Collector):
    """Metrics of all members that `engines` names. Who leaves the cluster leaves them too."""

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        engines = [(engine, (engine.member.role, engine.member.engine)) for engine in self._engines]
        ready = GaugeMetricFamily("splitserve_engine_ready", "1 while the engine takes requests.", labels=LABELS)
        for engine, labels in engines:
            ready.add_metric(labels, engine.ready)
        yield ready
        told = [(engine.stats, labels) for engine, labels in engines if engine.stats is not None]
        for figure in FIGURES:
            family = figure.kind(f"splitserve_{figure.name}", figure.help, labels=LABELS)
            for stats, labels in told:
                family.add_metric(labels, figure.value(stats))
            yield family
        for each in TRANSFER_FIGURES:
            transfers = CounterMetricFamily(f"splitserve_{each.name}", each.help, labels=(*LABELS, "transport"))
            for stats, labels in told:
                for counts in stats.transfers:
                    transfers.add_metric((*labels, counts.transport), each.value(counts))
            yield transfers
