"""The loop that every engine's leader runs: take messages, make a step, wait only when there is nothing to do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from splitserve.cluster.channel import Socket, WorkerChannel, wait
from splitserve.cluster.messages import EngineStats, Heartbeat, PrefixUpdate

log = logging.getLogger(__name__)

IDLE_WAIT_MS = 50
STATS_INTERVAL_S = 0.5

Send = Callable[[bytes, object], None]


class Engine(Protocol):
    def handle(self, router: bytes, item: object) -> None:
        """Take one message of a router. Never raises for anything that a router may send."""

    def step(self) -> bool:
        """Do some work; False when there was none."""

    @property
    def sockets(self) -> list[Socket]:
        """Where news for `step` comes from."""

    def forget(self, router: bytes) -> None:
        """Free everything of a router whose lease has ended."""

    def expire(self) -> None:
        """End the requests whose deadline has passed."""

    def stats(self) -> EngineStats: ...

    def prefix_update(self, since: int) -> PrefixUpdate | None:
        """How the prefix cache has changed since version `since`; None where it has not."""


def serve(engine: Engine, channel: WorkerChannel, stop: threading.Event, lease_s: float) -> None:
    """Serve until `stop` is set. A router that is silent for `lease_s` loses its requests."""
    leases = RouterLeases(lease_s)
    next_round = time.monotonic() + STATS_INTERVAL_S
    while not stop.is_set():
        for router, item in channel.receive():
            leases.renew(router, time.monotonic())
            if isinstance(item, Heartbeat):
                channel.send(router, engine.stats())
                if (update := engine.prefix_update(item.prefix_version)) is not None:
                    channel.send(router, update)
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
        if not engine.step():
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
