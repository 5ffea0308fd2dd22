"""up, down, status, logs: the life of a cluster."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict

from rich.console import Console

from splitserve.cluster.errors import InvalidRequest, NotFound, StartupError, WorkerUnavailable
from splitserve.cluster.log import log_path, merge, render, tail
from splitserve.cluster.topology_file import TopologyFile, load_topology_file
from splitserve.deploy.change import is_as, roll
from splitserve.deploy.cluster_state import ClusterFolder, ClusterState, find_cluster, write_atomically
from splitserve.deploy.commands.connection import add_deadline
from splitserve.deploy.default_topology import default_topology
from splitserve.deploy.launch import await_end, launch, stop
from splitserve.deploy.preflight import count_gpus
from splitserve.deploy.progress import make_view
from splitserve.deploy.ray_environment import prepare_ray
from splitserve.deploy.report import status_table
from splitserve.models.resolve import load_model_config

MAX_LINES, MAX_WAIT_S = 1_000_000, 86_400


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("up", help="start a cluster and return when it answers, or change one that runs")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", metavar="FILE", help="topology file")
    what.add_argument("--model", metavar="PATH", help="a model instead: the topology is made for this host and shown")
    parser.add_argument("--address", help="host:port of a Ray to join (default: start one on this host)")
    parser.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="how long nodes may take to join the Ray at --address (default: all are there)",
    )
    add_deadline(parser, "where it runs already and FILE has changed: ")
    parser.add_argument("--foreground", action="store_true", help="stay, and end the cluster on Ctrl-C")
    parser.set_defaults(run=up)

    parser = commands.add_parser("down", help="end a cluster, and the Ray that up started for it")
    parser.add_argument("name", nargs="?", help="cluster (default: the only one)")
    parser.set_defaults(run=down)

    parser = commands.add_parser("status", help="show the engines and routers of a cluster")
    parser.add_argument("name", nargs="?", help="cluster (default: the only one)")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=status)

    parser = commands.add_parser("logs", help="show the workers' last log lines, also of those that died")
    parser.add_argument("worker", nargs="?", help="pool/replica/rank, router/index or supervisor (default: all)")
    parser.add_argument("--cluster", metavar="NAME", help="cluster (default: the only one)")
    parser.add_argument("-n", "--lines", type=int, default=50, help="how many (default: %(default)s)")
    parser.set_defaults(run=logs)


def up(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.wait <= MAX_WAIT_S:
        raise InvalidRequest("wait", arguments.wait, f"give seconds, 0 to {MAX_WAIT_S}")
    file = load_topology_file(arguments.file) if arguments.file else _made_for_this_host(arguments.model)
    name, began = file.topology.name, time.monotonic()
    cluster = launch(file, arguments.address, make_view(), arguments.wait)
    if not cluster.is_new:
        if arguments.foreground:
            remedy = f"leave out --foreground, or `splitserve down {name}` first"
            raise StartupError(
                f"cluster {name} is already running, and not in the foreground of this command; {remedy}"
            )
        if is_as(cluster.state, file.topology):
            print(f"cluster {name} is already running")
        else:
            roll(cluster.state, file, make_view(), arguments.deadline)
            print(f"cluster {name} is as {file.path} says after {time.monotonic() - began:.1f} s")
        print_ready(find_cluster(name))
        return 0
    print(f"cluster {name} is ready after {time.monotonic() - began:.1f} s")
    print_ready(cluster.state)
    if arguments.foreground:
        try:
            print("Ctrl-C ends it", flush=True)
            await_end(cluster.state)
            raise WorkerUnavailable(f"cluster {name} has ended, or its Ray has")
        finally:
            stop(cluster.state)
    cluster.keep()
    return 0


def print_ready(state: ClusterState) -> None:
    """Where a cluster answers, and a command to try it."""
    command = f'splitserve generate --endpoint {state.endpoints[0]} --text "Once upon a time" --max-tokens 32'
    print(f"gRPC at {', '.join(state.endpoints)}; try:\n    {command}", flush=True)


def down(arguments: argparse.Namespace) -> int:
    state = find_cluster(arguments.name)
    stop(state)
    print(f"cluster {state.name} is down")
    return 0


def status(arguments: argparse.Namespace) -> int:
    state = find_cluster(arguments.name)
    prepare_ray(ClusterFolder(state.name).token)
    from splitserve.deploy import driver

    with driver.session(state.name, state.address):
        now = driver.status()
    if arguments.json:
        print(json.dumps(asdict(now), indent=2))
    else:
        Console().print(status_table(now))
    return 0


def logs(arguments: argparse.Namespace) -> int:
    if not 1 <= arguments.lines <= MAX_LINES:
        raise InvalidRequest("lines", arguments.lines, f"give a number from 1 to {MAX_LINES}")
    name = arguments.cluster or find_cluster(None).name
    folder = ClusterFolder(name)
    state = folder.live()
    if state is None or state.ray is not None:
        lines = _local_logs(folder, arguments.worker, arguments.lines)
    else:
        prepare_ray(folder.token)
        from splitserve.deploy import driver

        with driver.session(name, state.address):
            lines = driver.logs(arguments.worker, arguments.lines)
    for line in lines:
        print(render(line))
    return 0


def _local_logs(folder: ClusterFolder, worker: str | None, count: int) -> list[str]:
    """From this host's files, which outlive the cluster."""
    files = [log_path(folder.logs, worker)] if worker else sorted(folder.logs.glob("*.log"))
    if not files or not files[0].exists():
        there = ", ".join(sorted(path.stem for path in folder.logs.glob("*.log"))) or "none"
        raise NotFound(f"no log of {worker or 'any worker'} in {folder.logs}; there are: {there}")
    return merge([tail(path, count) for path in files], count)


def _made_for_this_host(model: str) -> TopologyFile:
    path = os.path.abspath(model) if os.path.exists(model) else model
    config = load_model_config(path)
    name, text = default_topology(path, config, len(os.sched_getaffinity(0)), count_gpus())
    folder = ClusterFolder(name)
    folder.make()
    file = folder.path / "topology.yaml"
    write_atomically(file, text)
    print(f"topology made for this host, {file}:\n{text}", file=sys.stderr)
    return load_topology_file(file)
