"""check, schema, cache: what starts nothing."""

from __future__ import annotations

import argparse
import json

from splitserve.cluster.topology_file import load_topology_file, topology_json_schema
from splitserve.cluster.units import format_bytes
from splitserve.deploy.check import render_plan
from splitserve.deploy.plan import make_plan
from splitserve.deploy.preflight import at_model_path
from splitserve.models.cache import clear, entries
from splitserve.models.resolve import load_model_config


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("check", help="check a topology and print its plan")
    parser.add_argument("file", metavar="FILE", help="topology file")
    parser.set_defaults(run=check)

    parser = commands.add_parser("schema", help="print the JSON schema of topology files, for editors")
    parser.set_defaults(run=schema)

    parser = commands.add_parser("cache", help="list converted models")
    parser.add_argument("--clear", action="store_true", help="remove them; they are made again when needed")
    parser.set_defaults(run=cache)


def check(arguments: argparse.Namespace) -> int:
    file = load_topology_file(arguments.file)
    with at_model_path(file):
        config = load_model_config(file.topology.model.path)
    print(render_plan(make_plan(file, config)))
    return 0


def schema(arguments: argparse.Namespace) -> int:
    print(json.dumps(topology_json_schema(), indent=2))
    return 0


def cache(arguments: argparse.Namespace) -> int:
    if arguments.clear:
        print(f"{format_bytes(clear())} freed")
        return 0
    for entry in entries():
        print(f"{format_bytes(entry.bytes):>10}  {entry.source}  ({entry.folder})")
    return 0
