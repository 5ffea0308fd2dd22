"""The `explain` command: a workload on a split cluster, then on a colocated one of the same size."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from splitserve.client import AsyncClient, Engine
from splitserve.cluster.topology import Topology
from splitserve.cluster.topology_file import TopologyFile, load_topology_file
from splitserve.deploy.bench.comparison import Name, Side, explain, table
from splitserve.deploy.bench.counterpart import colocated, named
from splitserve.deploy.bench.output import check_output
from splitserve.deploy.bench.plot import Run, check_plot, draw
from splitserve.deploy.bench.slo import Slo, parse_slo
from splitserve.deploy.bench.summary import summarize
from splitserve.deploy.bench.temporary import running
from splitserve.deploy.bench.watch import watch_load
from splitserve.deploy.bench.workload import Workload, add_workload, workload_of
from splitserve.deploy.change import prepare
from splitserve.deploy.commands.connection import Credentials, add_credentials, credentials
from splitserve.deploy.preflight import check_runnable

COUNTS_S = 2.0  # after which routers have heard the last of what engines count


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "explain", help="measure a workload split and colocated, and say which is better for it and why"
    )
    parser.add_argument("file", metavar="FILE", help="topology with two pools; the colocated one is made from it")
    parser.add_argument("--address", help="host:port of a Ray to join (default: start one on this host)")
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("--rate", type=float, help="Poisson arrivals, so many a second")
    load.add_argument("--trace", metavar="FILE", help="replay a trace of Mooncake's format (JSON lines)")
    add_workload(parser)
    parser.add_argument(
        "--slo", metavar="ttft=S,tpot=S", help="judge by the requests within these seconds (default: the topology's)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and words there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw both there: PNG, SVG or PDF")
    add_credentials(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    file, workload = load_topology_file(arguments.file), workload_of(arguments, arguments.rate)
    slo = _slo(file.topology) if arguments.slo is None else parse_slo(arguments.slo)
    check_output("json", arguments.json)
    if arguments.plot is not None:
        check_plot(arguments.plot)
    clusters: dict[Name, Topology] = {"split": file.topology, "colocated": colocated(file.topology)}
    trust = credentials(arguments)
    files = {name: replace(file, topology=named(topology, name)) for name, topology in clusters.items()}
    for each in files.values():
        check_runnable(prepare(each))
    sides = [_measure(name, each, arguments.address, workload, slo, trust) for name, each in files.items()]
    sentences = explain(*sides)
    Console().print(table(*sides), *sentences, sep="\n")
    if arguments.json is not None:
        document: dict[str, object] = {"workload": asdict(workload), "explanation": sentences}
        for side in sides:
            document[side.name] = asdict(side.run.summary) | {"decode_batch": side.decode_batch}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        draw([side.run for side in sides], arguments.plot)
    return 1 if any(side.run.summary.errors for side in sides) else 0


def _slo(topology: Topology) -> Slo | None:
    given = topology.router.slo
    return None if given.ttft_s is None and given.tpot_s is None else Slo(given.ttft_s, given.tpot_s)


def _measure(
    name: Name, file: TopologyFile, address: str | None, workload: Workload, slo: Slo | None, trust: Credentials
) -> Side:
    with running(file, address) as endpoints:
        return asyncio.run(_load(name, endpoints, workload, slo, trust))


async def _load(
    name: Name, endpoints: tuple[str, ...], workload: Workload, slo: Slo | None, trust: Credentials
) -> Side:
    async with AsyncClient(endpoints, **trust) as client:
        (model, *_) = await client.models()
        load = workload.load(model)
        before = (await client.status()).engines
        outcomes, wall_s = await watch_load(client, load, workload.concurrency)
        await asyncio.sleep(COUNTS_S)
        after = (await client.status()).engines
    summary = summarize(outcomes, wall_s, slo)
    tokens, steps = (later - earlier for earlier, later in zip(_counts(before), _counts(after), strict=True))
    batch = (tokens - load.count - len(load.warmup)) / max(1, steps)  # first tokens come from no decode step
    return Side(name, _names(after), Run(name, workload.rate, tuple(outcomes), summary), batch)


def _names(engines: Sequence[Engine]) -> str:
    roles = [engine.role for engine in engines]
    return " + ".join(f"{roles.count(role)} {role}" for role in ("prefill", "decode", "colocated") if role in roles)


def _counts(engines: Sequence[Engine]) -> tuple[int, int]:
    return sum(engine.output_tokens for engine in engines), sum(engine.decode_steps for engine in engines)
