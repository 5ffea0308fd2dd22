"""drain, undrain, scale, restart, switch: changes of a cluster that runs, which lose no request."""

from __future__ import annotations

import argparse

from splitserve.deploy.change import change, scale
from splitserve.deploy.cluster_state import find_cluster
from splitserve.deploy.commands.connection import add_deadline
from splitserve.deploy.progress import make_view

SWITCH_S = 2.0  # so that a switch takes less than five
WORKER = "engine or router, as `splitserve status` names it: pool/replica/dp or router/index"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("drain", help="end a worker once it has ended what it runs; it stays away")
    parser.add_argument("worker", metavar="WORKER", help=WORKER)
    add_deadline(parser)
    parser.set_defaults(run=drain)
    _add_cluster(parser)

    parser = commands.add_parser("undrain", help="start a drained worker again, or end its drain")
    parser.add_argument("worker", metavar="WORKER", help=WORKER)
    parser.set_defaults(run=undrain)
    _add_cluster(parser)

    parser = commands.add_parser("scale", help="give a pool another number of replicas")
    parser.add_argument("pool", metavar="POOL", help="prefill, decode, colocated or router")
    parser.add_argument("replicas", metavar="N", type=int, help="replicas to have; the last ones leave")
    add_deadline(parser)
    parser.set_defaults(run=resize)
    _add_cluster(parser)

    parser = commands.add_parser("restart", help="start all workers anew, one after another")
    add_deadline(parser)
    parser.set_defaults(run=restart)
    _add_cluster(parser)

    parser = commands.add_parser("switch", help="have an engine serve another role with the weights that it holds")
    parser.add_argument("worker", metavar="WORKER", help=WORKER)
    parser.add_argument("role", metavar="ROLE", help="prefill or decode")
    add_deadline(parser, default=SWITCH_S)
    parser.set_defaults(run=switch)
    _add_cluster(parser)


def drain(arguments: argparse.Namespace) -> int:
    state, worker = find_cluster(arguments.cluster), arguments.worker
    change(state, make_view(), "drain", worker, arguments.deadline)
    print(f"{worker} is drained; `splitserve undrain {worker}` starts it again")
    return 0


def undrain(arguments: argparse.Namespace) -> int:
    change(find_cluster(arguments.cluster), make_view(), "undrain", arguments.worker)
    print(f"{arguments.worker} takes requests")
    return 0


def resize(arguments: argparse.Namespace) -> int:
    state = find_cluster(arguments.cluster)
    scale(state, arguments.pool, arguments.replicas, make_view(), arguments.deadline)
    print(f"{arguments.pool} has {arguments.replicas} replicas")
    return 0


def restart(arguments: argparse.Namespace) -> int:
    seconds = change(find_cluster(arguments.cluster), make_view(), "restart", arguments.deadline)
    print(f"all workers have started anew after {seconds:.1f} s")
    return 0


def switch(arguments: argparse.Namespace) -> int:
    state, worker, role = find_cluster(arguments.cluster), arguments.worker, arguments.role
    seconds = change(state, make_view(), "switch", worker, role, arguments.deadline)
    print(f"{worker} serves as {role} after {seconds:.1f} s")
    return 0


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", metavar="NAME", help="cluster (default: the only one)")
