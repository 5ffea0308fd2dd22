"""Who comes next where not all can: by priority, then so that tenants get equal shares, then as they came."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Claimant:
    """Who asks. Of two `priority` values the smaller one goes first; `cost` counts against the tenant's share."""

    tenant: str = ""
    priority: int = 0
    cost: float = 1.0


@dataclass(order=True, slots=True)
class Claim:
    """A place in line, the smallest one first; it stays the same however often it is made use of."""

    priority: int
    start: float
    number: int
    turn: asyncio.Future[None] = field(init=False, compare=False, repr=False)


class FairSemaphore:
    """At most `capacity` hold it at once.

    Shares are start-time fair queueing's (Goyal, Vin, Cheng 1996): a claim starts where its tenant's last one ends, in
    units of cost, but no earlier than the claim that was served last. So a tenant with a thousand requests in line
    delays another one's first request by one of its own, and what a tenant left unused is not saved up.
    """

    def __init__(self, capacity: int) -> None:
        self._free = capacity
        self._line: list[Claim] = []
        self._numbers = itertools.count()
        self._virtual = 0.0
        self._ends: dict[str, float] = {}

    @property
    def locked(self) -> bool:
        """Whether the next one who asks has to wait."""
        return not self._free

    def claim(self, claimant: Claimant) -> Claim:
        start = max(self._virtual, self._ends.get(claimant.tenant, 0.0))
        self._ends[claimant.tenant] = start + claimant.cost
        return Claim(claimant.priority, start, next(self._numbers))

    def outranked(self, claim: Claim) -> bool:
        """Whether somebody waits who goes before `claim`."""
        return bool(self._line) and self._line[0] < claim

    @asynccontextmanager
    async def hold(self, claim: Claim) -> AsyncIterator[None]:
        """Wait for one's turn, and have it."""
        await self.acquire(claim)
        try:
            yield
        finally:
            self.release()

    async def acquire(self, claim: Claim) -> None:
        """Wait for one's turn, which lasts until `release`."""
        claim.turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._line, claim)
        self._next()
        try:
            await claim.turn
        except asyncio.CancelledError:
            if claim in self._line:
                self._line.remove(claim)
                heapq.heapify(self._line)
            else:  # its turn came in the same moment
                self.release()
            raise

    def release(self) -> None:
        self._free += 1
        self._next()

    def _next(self) -> None:
        while self._free and self._line:
            claim = heapq.heappop(self._line)
            self._free -= 1
            self._virtual = max(self._virtual, claim.start)
            if not claim.turn.done():
                claim.turn.set_result(None)
