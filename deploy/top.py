"""What `splitserve top` shows: the load of a cluster between two looks at its routers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Column, Table

from splitserve.client import Client, ClusterStatus, Engine, Latency, SplitserveClientError
from splitserve.deploy.commands.connection import Credentials

ANSWER_S = 1.0
STATE_STYLES = {"ready": "green", "starting": "yellow", "draining": "yellow", "silent": "red"}


@dataclass(frozen=True)
class Look:
    """What each router said, None where it did not answer. `at` is in seconds of the monotonic clock."""

    routers: dict[str, ClusterStatus | None]
    at: float = field(default_factory=time.monotonic)

    @property
    def status(self) -> ClusterStatus | None:
        """Of the first router that answered."""
        return next((status for status in self.routers.values() if status is not None), None)

    @property
    def engines(self) -> dict[tuple[str, str], Engine]:
        """By name and incarnation, as the first router that answered sees them."""
        known = self.status.engines if self.status else ()
        return {(engine.name, engine.incarnation): engine for engine in known}


class Watch:
    """Looks at the routers at `endpoints`."""

    def __init__(self, endpoints: Sequence[str], credentials: Credentials) -> None:
        self._clients = {endpoint: Client(endpoint, **credentials) for endpoint in endpoints}

    def look(self) -> Look:
        return Look({endpoint: _ask(client) for endpoint, client in self._clients.items()})

    def close(self) -> None:
        for client in self._clients.values():
            client.close()


def _ask(client: Client) -> ClusterStatus | None:
    try:
        return client.status(timeout_s=ANSWER_S)
    except SplitserveClientError as error:
        if error.code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            raise
        return None


def frame(before: Look, now: Look) -> Group:
    """Tables of routers and engines; rates are those from `before` to `now`, in tokens per second."""
    status = now.status
    title = f"cluster {status.cluster}, model {escape(status.model)}" if status else "no router answers"
    return Group(_routers(now, title), _engines(before, now))


def _routers(now: Look, title: str) -> Table:
    table = _table("router", "active", "queued", "/min", "TTFT p50", "p99", "TPOT p50", "p99")
    table.title, table.title_justify = title, "left"
    for endpoint, status in now.routers.items():
        if status is None:
            table.add_row(escape(endpoint), "[red]no answer[/red]")
            continue
        counts = (status.active_requests, status.queued_requests, status.recent_requests)
        latencies = _latency(status.ttft), _latency(status.tpot)
        table.add_row(escape(endpoint), *map(str, counts), *latencies[0], *latencies[1])
    return table


def _engines(before: Look, now: Look) -> Table:
    table = _table("engine", "state", "run", "wait", "KV", "in/s", "out/s", "batch", "hits", "preempt")
    table.columns[1].justify = "left"
    seconds, earlier = max(now.at - before.at, 1e-9), before.engines
    prompt_rate = output_rate = 0.0
    pool = ""
    for key, engine in sorted(now.engines.items()):
        if pool and engine.role != pool:
            table.add_section()
        pool = engine.role
        since = _Since(engine, earlier.get(key))
        prompt_rate += since.prompt_tokens / seconds
        output_rate += since.output_tokens / seconds
        used = 1 - engine.free_kv_tokens / engine.total_kv_tokens if engine.total_kv_tokens else 0.0
        table.add_row(
            engine.name,
            f"[{STATE_STYLES[engine.state]}]{engine.state}[/]",
            f"{engine.running}/{engine.slots}" if engine.slots else str(engine.running),
            str(engine.waiting),
            f"{used:.0%}",
            f"{since.prompt_tokens / seconds:,.0f}",
            f"{since.output_tokens / seconds:,.0f}",
            f"{since.output_tokens / since.decode_steps:.1f}" if since.decode_steps else "",
            f"{since.cached_tokens / since.queried_tokens:.0%}" if since.queried_tokens else "",
            str(engine.preemptions),
        )
    table.caption = f"in all {prompt_rate:,.0f} prompt tokens/s computed, {output_rate:,.0f} output tokens/s"
    table.caption_justify = "left"
    return table


def _table(first: str, *numbers: str) -> Table:
    """One that fits a terminal of 80 columns."""
    columns = (Column(name, justify="right", no_wrap=True) for name in numbers)
    return Table(
        Column(first, no_wrap=True),
        *columns,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )


class _Since:
    """What an engine has done since an earlier look, or since its start if there was none."""

    def __init__(self, now: Engine, before: Engine | None) -> None:
        self.prompt_tokens = now.prompt_tokens - (before.prompt_tokens if before else 0)
        self.output_tokens = now.output_tokens - (before.output_tokens if before else 0)
        self.decode_steps = now.decode_steps - (before.decode_steps if before else 0)
        self.queried_tokens = now.queried_tokens - (before.queried_tokens if before else 0)
        self.cached_tokens = now.cached_tokens - (before.cached_tokens if before else 0)


def _latency(latency: Latency) -> tuple[str, str]:
    return _time(latency.p50_s), _time(latency.p99_s)


def _time(seconds: float) -> str:
    """In at most eight characters."""
    if seconds < 0.99995:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"
