"""trace: what a running cluster does with its time."""

from __future__ import annotations

import argparse
from pathlib import Path

from splitserve.client import Client, SplitserveClientError
from splitserve.cluster.errors import InvalidRequest
from splitserve.deploy.commands.connection import add_connection, credentials, endpoints


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("trace", help="where the time of a request went, for ui.perfetto.dev")
    parser.add_argument("request", nargs="?", default="", help="its id (default: all requests that ended lately)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write there (default: standard output)")
    add_connection(parser)
    parser.set_defaults(run=trace)


def trace(arguments: argparse.Namespace) -> int:
    content = _find_trace(arguments)
    if arguments.output is None:
        print(content)
        return 0
    try:
        arguments.output.write_text(content)
    except OSError as error:
        raise InvalidRequest("output", str(arguments.output), f"{error.strerror}: name a file to write") from error
    print(f"{arguments.output}: open it in ui.perfetto.dev")
    return 0


def _find_trace(arguments: argparse.Namespace) -> str:
    """From the router that served the request."""
    shown = credentials(arguments)
    *others, last = endpoints(arguments) if arguments.request else endpoints(arguments)[:1]
    for endpoint in others:
        try:
            with Client(endpoint, **shown) as client:
                return client.trace(arguments.request)
        except SplitserveClientError as error:
            if error.code not in ("NOT_FOUND", "UNAVAILABLE"):
                raise
    with Client(last, **shown) as client:
        return client.trace(arguments.request)
