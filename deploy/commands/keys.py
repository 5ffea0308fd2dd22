"""keygen: what members of a cluster know each other by, and what its users are known by."""

from __future__ import annotations

import argparse
from pathlib import Path

from splitserve.cluster.api_key_file import add_api_key
from splitserve.cluster.cluster_key import write_cluster_key


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("keygen", help="make the key that workers and routers share, or a user's API key")
    parser.add_argument("file", nargs="?", type=Path, help="(default: cluster.key, with --api api-keys.toml)")
    parser.add_argument(
        "--api", metavar="NAME", help="make an API key for NAME, print it, and add its hash to the file"
    )
    parser.set_defaults(run=keygen)


def keygen(arguments: argparse.Namespace) -> int:
    if arguments.api is not None:
        print(add_api_key(arguments.file or Path("api-keys.toml"), arguments.api))
        return 0
    file = arguments.file or Path("cluster.key")
    write_cluster_key(file)
    print(f"{file}: bring it to every host, and name it as security.cluster_key in the topology")
    return 0
