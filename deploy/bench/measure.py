"""Sends requests and notes when their tokens arrive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from splitserve.client import AsyncClient, SplitserveClientError, Timings
from splitserve.deploy.bench.load import LoadRequest
from splitserve.deploy.bench.workload import Load


@dataclass(frozen=True)
class Outcome:
    """How one request went: `arrivals` are (seconds since `sent_at`, tokens) of each message with tokens.

    `error` is the gRPC status name of a request that failed, None of one that went well, which has the router's
    `timings` too.
    """

    sent_at: float
    arrivals: tuple[tuple[float, int], ...]
    error: str | None = None
    timings: Timings | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token. Only where one came."""
        return self.arrivals[0][0]

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first message; None for an answer of one message."""
        later = sum(count for _, count in self.arrivals[1:])
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / later if later else None

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between messages."""
        return [later - earlier for (earlier, _), (later, _) in pairwise(self.arrivals)]


async def run_load(client: AsyncClient, load: Load, concurrency: int, note: Callable[[Outcome], None]) -> None:
    """Warm up, then send the requests as `load` says, and `note` each as it ends."""
    await run_closed_loop(client, load.warmup, concurrency, lambda outcome: None)
    if load.arrivals is None:
        await run_closed_loop(client, load.requests, concurrency, note)
    else:
        await run_open_loop(client, load.requests, load.arrivals, note)


async def run_closed_loop(
    client: AsyncClient, requests: Iterable[LoadRequest], concurrency: int, note: Callable[[Outcome], None]
) -> None:
    """Keep `concurrency` requests going until there are no more, and `note` each as it ends."""
    waiting = iter(requests)

    async def take_turns() -> None:
        for request in waiting:
            note(await send(client, request))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(take_turns())


async def run_open_loop(
    client: AsyncClient,
    requests: Iterable[LoadRequest],
    arrivals: Iterable[float],
    note: Callable[[Outcome], None],
) -> None:
    """Send each request at its arrival time, however many are under way, and `note` each as it ends."""
    start = time.perf_counter()

    async def send_one(request: LoadRequest) -> None:
        note(await send(client, request))

    async with asyncio.TaskGroup() as group:
        for request, due in zip(requests, arrivals, strict=False):
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            group.create_task(send_one(request))


async def send(client: AsyncClient, request: LoadRequest) -> Outcome:
    """One request, to its end. It asks for exactly `max_tokens` tokens, whatever they are."""
    sent_at = time.perf_counter()
    arrivals: list[tuple[float, int]] = []
    try:
        stream = client.generate(request.prompt, max_tokens=request.max_tokens, ignore_eos=True)
        async for delta in stream:
            if delta.token_ids:
                now = time.perf_counter() - sent_at
                arrivals.append((now, len(delta.token_ids)))
        timings = (await stream.result()).summary.timings
    except SplitserveClientError as error:
        return Outcome(sent_at, tuple(arrivals), error.code)
    return Outcome(sent_at, tuple(arrivals), timings=timings)
