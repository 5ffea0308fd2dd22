"""The `bench` command."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from splitserve.client import AsyncClient
from splitserve.cluster.errors import InvalidRequest
from splitserve.deploy.bench import engine_command
from splitserve.deploy.bench.load import LENGTHS, LoadRequest, LoadShape, make_requests, poisson_arrivals
from splitserve.deploy.bench.measure import Outcome, run_closed_loop, run_open_loop
from splitserve.deploy.bench.summary import Summary, summarize, summary_table
from splitserve.deploy.commands.connection import Credentials, add_connection, credentials, endpoint


@dataclass(frozen=True)
class BenchOptions:
    """`rate` in requests a second makes a Poisson load; None a closed loop of `concurrency` requests."""

    shape: LoadShape
    requests: int
    warmup: int
    concurrency: int
    rate: float | None
    seed: int

    def __post_init__(self) -> None:
        for name in ("requests", "concurrency"):
            if getattr(self, name) < 1:
                raise InvalidRequest(name, getattr(self, name), "give at least 1")
        if self.warmup < 0:
            raise InvalidRequest("warmup", self.warmup, "give 0 or more")
        if self.rate is not None and self.rate <= 0:
            raise InvalidRequest("rate", self.rate, "give more than 0 requests a second")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="put load on a running cluster and show what its clients see")
    add_connection(parser)
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument("--concurrency", type=int, default=8, help="requests under way at once (default: %(default)s)")
    loop.add_argument("--rate", type=float, help="instead: Poisson arrivals, so many a second")
    parser.add_argument("--requests", type=int, default=64, help="how many are measured (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="sent before, not measured (default: %(default)s)")
    for name, default in (("prompt", "128"), ("output", "64")):
        parser.add_argument(
            f"--{name}-tokens", default=default, metavar="LENGTHS", help=f"{LENGTHS} (default: %(default)s)"
        )
    parser.add_argument("--prefix-share", type=float, default=0.0, help="share of each prompt that all have in common")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, prompts and arrivals (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write options and figures there")
    parser.set_defaults(run=bench)
    engine_command.add_command(parser.add_subparsers(metavar="engine"))


def bench(arguments: argparse.Namespace) -> int:
    options = BenchOptions(
        shape=LoadShape(arguments.prompt_tokens, arguments.output_tokens, arguments.prefix_share),
        requests=arguments.requests,
        warmup=arguments.warmup,
        concurrency=arguments.concurrency,
        rate=arguments.rate,
        seed=arguments.seed,
    )
    summary = asyncio.run(run(options, endpoint(arguments), credentials(arguments)))
    Console().print(summary_table(summary))
    if arguments.json is not None:
        document = {"options": asdict(options), "summary": asdict(summary)}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 1 if summary.errors else 0


async def run(options: BenchOptions, address: str, trust: Credentials) -> Summary:
    """Warm up, then measure one load on the router at `address`."""
    async with AsyncClient(address, **trust) as client:
        (model, *_) = await client.models()
        requests = make_requests(options.shape, model.vocab_size, options.warmup + options.requests, options.seed)
        await run_closed_loop(client, requests[: options.warmup], options.concurrency, lambda outcome: None)
        began = time.perf_counter()
        outcomes = await _measure(options, client, requests[options.warmup :])
        return summarize(outcomes, time.perf_counter() - began)


async def _measure(options: BenchOptions, client: AsyncClient, requests: list[LoadRequest]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("requests", total=len(requests))

        def note(outcome: Outcome) -> None:
            outcomes.append(outcome)
            progress.advance(task)

        if options.rate is None:
            await run_closed_loop(client, requests, options.concurrency, note)
        else:
            await run_open_loop(client, requests, poisson_arrivals(options.rate, options.seed), note)
    return outcomes
