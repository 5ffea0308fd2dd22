"""The `bench` command."""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from splitserve.client import AsyncClient
from splitserve.cluster.errors import InvalidRequest
from splitserve.deploy.bench import engine_command, explain_command
from splitserve.deploy.bench.output import check_output
from splitserve.deploy.bench.plot import Run, check_plot, draw
from splitserve.deploy.bench.slo import Slo, parse_slo
from splitserve.deploy.bench.summary import summarize, summary_table
from splitserve.deploy.bench.watch import watch_load
from splitserve.deploy.bench.workload import DEFAULTS, Workload, add_workload, workload_of
from splitserve.deploy.commands.connection import Credentials, add_connection, credentials, endpoint


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="put load on a running cluster and show what its clients see")
    add_connection(parser)
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument(
        "--concurrency",
        type=int,
        default=DEFAULTS["concurrency"],
        help="requests under way at once (default: %(default)s)",
    )
    loop.add_argument("--rate", metavar="RATES", help="instead: Poisson arrivals, so many a second; or 1,2,4 in turn")
    loop.add_argument("--trace", metavar="FILE", help="instead: replay a trace of Mooncake's format (JSON lines)")
    add_workload(parser)
    parser.add_argument("--slo", metavar="ttft=S,tpot=S", help="count the requests within these seconds (goodput)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write workload and figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there: PNG, SVG or PDF")
    parser.set_defaults(run=bench)
    engine_command.add_command(parser.add_subparsers(metavar="engine"))
    explain_command.add_command(commands)


def bench(arguments: argparse.Namespace) -> int:
    rates = [None] if arguments.rate is None else [_rate(part) for part in arguments.rate.split(",")]
    workloads = [workload_of(arguments, rate, arguments.concurrency) for rate in rates]
    slo = None if arguments.slo is None else parse_slo(arguments.slo)
    check_output("json", arguments.json)
    if arguments.plot is not None:
        check_plot(arguments.plot)
    address, trust = endpoint(arguments), credentials(arguments)
    runs = [asyncio.run(measure(workload, slo, address, trust)) for workload in workloads]
    if arguments.json is not None:
        document = {"runs": [_document(*pair) for pair in zip(workloads, runs, strict=True)]}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        draw(runs, arguments.plot)
    return 1 if any(run.summary.errors for run in runs) else 0


async def measure(workload: Workload, slo: Slo | None, address: str, trust: Credentials) -> Run:
    """One load on the router at `address`, shown when it is over."""
    async with AsyncClient(address, **trust) as client:
        (model, *_) = await client.models()
        load = workload.load(model)
        console = Console()
        if load.left_out:
            console.print(f"{load.left_out} requests of the trace do not fit into {model.context:,} tokens: left out")
        outcomes, wall_s = await watch_load(client, load, workload.concurrency)
    run = Run(_label(workload), workload.rate, tuple(outcomes), summarize(outcomes, wall_s, slo))
    if workload.rate is not None:
        console.print(f"[bold]{run.label}[/bold]")
    console.print(summary_table(run.summary))
    return run


def _rate(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InvalidRequest("rate", text, "give requests a second, such as 2.5, or several: 1,2,4") from error


def _label(workload: Workload) -> str:
    if workload.trace is not None:
        return f"{Path(workload.trace).name} at {workload.speed:g}x"
    return f"{workload.concurrency} at once" if workload.rate is None else f"{workload.rate:g} requests/s"


def _document(workload: Workload, run: Run) -> dict[str, object]:
    return {"label": run.label, "workload": asdict(workload), "summary": asdict(run.summary)}
