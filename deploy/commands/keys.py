"""keygen: what members of a cluster know each other by."""

from __future__ import annotations

import argparse
from pathlib import Path

from splitserve.cluster.cluster_key import write_cluster_key


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("keygen", help="make the key that a cluster's workers and routers share")
    parser.add_argument("file", nargs="?", type=Path, default=Path("cluster.key"), help="(default: %(default)s)")
    parser.set_defaults(run=keygen)


def keygen(arguments: argparse.Namespace) -> int:
    write_cluster_key(arguments.file)
    print(f"{arguments.file}: bring it to every host, and name it as security.cluster_key in the topology")
    return 0
