"""The text that `splitserve check` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from splitserve.cluster.topology_sections import Security
from splitserve.cluster.units import format_bytes
from splitserve.deploy.plan import Plan, PoolPlan, RankPlan

_HEADER = ("pool", "replicas", "tp", "dp", "ep", "ranks", "device", "weights/rank", "KV/rank", "KV tokens/engine")


def render_plan(plan: Plan) -> str:
    """A plan as aligned plain text, one screen even for large clusters."""
    topology = plan.topology
    model, router = topology.model, topology.router
    per_token = plan.model.kv_bytes_per_token(model.dtype)
    places = [router.grpc_address(index) for index in range(router.replicas)]
    places += [f"http://{http}" for index in range(router.replicas) if (http := router.http_address(index))]
    size = f"{plan.parameters / 1e9:.1f}B" if plan.parameters >= 1e9 else f"{plan.parameters / 1e6:.1f}M"
    return "\n".join(
        [
            f"{topology.name}: {model.served_name}, {size} parameters, {model.dtype}",
            f"context {model.context} tokens, {per_token:,} bytes of KV a token ({plan.model.architecture})",
            "",
            *_table([_HEADER, *(_pool_row(pool) for pool in plan.pools)]),
            "",
            *_table([("host", "ranks", "devices"), *_places(plan)]),
            "",
            f"router       {', '.join(places)}",
            f"KV transfer  {_transports(plan)}",
            f"workers at   {topology.security.bind}, {_protection(topology.security)}",
            f"needs        {_count(plan.cpus, 'CPU')} and {_count(plan.gpus, 'GPU')} on {_count(plan.hosts, 'host')}",
        ]
    )


def _pool_row(pool: PoolPlan) -> tuple[str, ...]:
    layout = pool.layout
    counts = (len(pool.engines) // layout.dp, layout.tp, layout.dp, layout.ep, len(pool.ranks))
    sizes = (format_bytes(pool.weight_bytes), format_bytes(pool.kv_bytes), f"{pool.kv_tokens:,}")
    return (pool.role, *(str(count) for count in counts), pool.device, *sizes)


def _places(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """A row for each run of a replica's ranks on one host."""
    for pool in plan.pools:
        for (replica, host), run in groupby(pool.ranks, lambda rank: (rank.name.rpartition("/")[0], rank.slot.host)):
            ranks = list(run)
            yield str(host), f"{replica}/{_span(ranks)}", _devices(ranks)


def _span(ranks: Sequence[RankPlan]) -> str:
    return _range(*(rank.name.rpartition("/")[2] for rank in (ranks[0], ranks[-1])))


def _devices(ranks: Sequence[RankPlan]) -> str:
    devices = [rank.slot.device for rank in (ranks[0], ranks[-1])]
    if devices[0] == "cpu":
        return "cpu"
    return f"cuda:{_range(*(device.removeprefix('cuda:') for device in devices))}"


def _range(first: str, last: str) -> str:
    return first if first == last else f"{first}-{last}"


def _transports(plan: Plan) -> str:
    pairs = Counter(link.transport for link in plan.links)
    text = ", ".join(f"{_count(count, 'engine pair')} over {transport}" for transport, count in sorted(pairs.items()))
    return text or "none: one pool does both"


def _protection(security: Security) -> str:
    if not security.encrypted:
        return "plain text" if security.is_loopback else "plain text: whoever reaches them may command them"
    return f"CURVE with {security.cluster_key or 'a key made at start'}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
