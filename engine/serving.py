"""The loop that every engine's leader runs: take messages, make a step, wait only when there is nothing to do.

An engine that drains refuses reservations and ends what it holds. Prompts still come in: decode has room for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from splitserve.cluster.channel import Pollable, WorkerChannel, wait
from splitserve.cluster.messages import Busy, EngineStats, Heartbeat, PrefixUpdate, Reserve

log = logging.getLogger(__name__)

IDLE_WAIT_MS = 50
STATS_INTERVAL_S = 0.5
SETTLE_S = 0.5  # a prompt may still be under way from a router that has not heard of the drain
DRAINING_RETRY_S = 0.1

Send = Callable[[bytes, object], None]


class Engine(Protocol):
    def handle(self, router: bytes, item: object) -> None:
        """Take one message of a router. Never raises for anything that a router may send."""

    def step(self) -> bool:
        """Do some work; False when there was none."""

    @property
    def sockets(self) -> list[Pollable]:
        """Where news for `step` comes from."""

    def forget(self, router: bytes) -> None:
        """Free everything of a router whose lease has ended."""

    def expire(self) -> None:
        """End the requests whose deadline has passed."""

    @property
    def idle(self) -> bool:
        """Whether it holds nothing of any request."""

    def stats(self) -> EngineStats: ...

    def prefix_update(self, since: int) -> PrefixUpdate | None:
        """How the prefix cache has changed since version `since`; None where it has not."""


class Drain:
    """An engine's drain, set off by other threads: `wanted` while it is to take no reservations."""

    def __init__(self) -> None:
        self.wanted = False
        self._idle_since: float | None = None

    def note(self, idle: bool, now: float) -> None:
        """Hear from the loop whether its engine is idle."""
        if not (self.wanted and idle):
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now

    @property
    def is_done(self) -> bool:
        """Whether the engine has been idle for SETTLE_S."""
        since = self._idle_since
        return since is not None and time.monotonic() - since >= SETTLE_S


def serve(engine: Engine, channel: WorkerChannel, is_over: Callable[[], bool], lease_s: float, drain: Drain) -> None:
    """Serve until `is_over`. A router that is silent for `lease_s` loses its requests."""
    leases = RouterLeases(lease_s)
    next_round = time.monotonic() + STATS_INTERVAL_S
    while not is_over():
        for router, item in channel.receive():
            leases.renew(router, time.monotonic())
            if isinstance(item, Heartbeat):
                channel.send(router, engine.stats())
                if (update := engine.prefix_update(item.prefix_version)) is not None:
                    channel.send(router, update)
            elif drain.wanted and isinstance(item, Reserve):
                channel.send(router, Busy(item.request_id, item.attempt, DRAINING_RETRY_S))
            else:
                engine.handle(router, item)
        if time.monotonic() >= next_round:
            next_round = time.monotonic() + STATS_INTERVAL_S
            for router in leases.expired(time.monotonic()):
                log.warning(
                    "a router's lease ended: its requests are freed", extra={"router": router.decode(errors="replace")}
                )
                engine.forget(router)
            engine.expire()
            for router in leases.routers:
                channel.send(router, engine.stats())
        worked = engine.step()
        drain.note(engine.idle, time.monotonic())
        if not worked:
            wait([channel.socket, *engine.sockets], IDLE_WAIT_MS)


class RouterLeases:
    """When each router was last heard from."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._heard: dict[bytes, float] = {}

    @property
    def routers(self) -> list[bytes]:
        return list(self._heard)

    def renew(self, router: bytes, now: float) -> None:
        self._heard[router] = now

    def expired(self, now: float) -> list[bytes]:
        """Routers whose lease is over; they are forgotten here."""
        late = [router for router, heard in self._heard.items() if now - heard > self._lease_s]
        for router in late:
            del self._heard[router]
        return late
