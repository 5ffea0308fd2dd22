"""Admission: how many requests may run, how many may wait, and when to come back."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext

from splitserve.cluster.errors import Overloaded
from splitserve.router.fair import Claimant, FairSemaphore

MIN_RETRY_S = 0.1
MAX_RETRY_S = 30.0
SMOOTHING = 0.1


class Admission:
    """At most `max_active` requests are admitted at once and at most `max_queue` wait, in `FairSemaphore`'s order.

    `active` counts the admitted; `queued` those that wait, be it for admission or, already admitted, for an engine.
    """

    def __init__(self, max_queue: int, max_active: int) -> None:
        self.max_queue, self.max_active = max_queue, max_active
        self._slots = FairSemaphore(max_active)
        self._service_s = 1.0  # smoothed time that a request takes
        self.queued = 0
        self.active = 0

    @asynccontextmanager
    async def admit(self, claimant: Claimant, queues: float = 1.0) -> AsyncIterator[None]:
        """Hold one of the places, after waiting for it if need be. Raises what `wait` does."""
        with self.wait(queues) if self._slots.locked else nullcontext():
            await self._slots.acquire(self._slots.claim(claimant))
        self.active += 1
        started = time.monotonic()
        try:
            yield
        finally:
            self._slots.release()
            self.active -= 1
            self._service_s += SMOOTHING * (time.monotonic() - started - self._service_s)

    @contextmanager
    def wait(self, queues: float = 1.0) -> Iterator[None]:
        """Count as one more that waits. Raises Overloaded when so many times `max_queue` wait already."""
        if self.queued >= self.max_queue * queues:
            raise Overloaded(f"the queue is full: {self.queued} requests wait", self.retry_after_s())
        self.queued += 1
        try:
            yield
        finally:
            self.queued -= 1

    def retry_after_s(self) -> float:
        """When about half of the queue will have moved on, by the time that requests took lately."""
        estimate = self._service_s * self.queued / (2 * max(self.active, 1))
        return min(max(estimate, MIN_RETRY_S), MAX_RETRY_S)
