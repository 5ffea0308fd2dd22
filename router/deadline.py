"""How long a client waits for its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from splitserve.cluster.errors import DeadlineExceeded

CHECK = "the request was checked"


class Deadline:
    """`seconds` from now, for all that a router does for a call: checks, waiting and the answer."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._at = seconds, time.monotonic() + seconds

    @property
    def remaining_s(self) -> float:
        """Seconds until it passes."""
        return max(self._at - time.monotonic(), 0.0)

    @asynccontextmanager
    async def bounds(self, stage: Callable[[], str] = lambda: CHECK) -> AsyncIterator[None]:
        """End what is done within when it passes. Raises DeadlineExceeded that names the `stage` reached."""
        try:
            async with asyncio.timeout(self.remaining_s):
                yield
        except TimeoutError as error:
            raise DeadlineExceeded(f"{round(self._seconds, 3):.10g} s passed while {stage()}") from error
