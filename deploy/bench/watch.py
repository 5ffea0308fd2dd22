"""Sends a load and shows how far it is."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from splitserve.client import AsyncClient
from splitserve.deploy.bench.measure import Outcome, run_load
from splitserve.deploy.bench.workload import Load


async def watch_load(client: AsyncClient, load: Load, concurrency: int) -> tuple[Sequence[Outcome], float]:
    """What came of each request, and the seconds from the first one's start to the last one's end."""
    outcomes: list[Outcome] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("requests", total=load.count)

        def note(outcome: Outcome) -> None:
            outcomes.append(outcome)
            progress.advance(task)

        await run_load(client, load, concurrency, note)
    return outcomes, time.perf_counter() - min(outcome.sent_at for outcome in outcomes)
