"""top, trace: what a running cluster does with its time."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from splitserve.client import Client, SplitserveClientError
from splitserve.deploy.bench.output import check_output
from splitserve.deploy.commands.connection import add_connection, credentials, endpoints
from splitserve.deploy.top import Watch, frame

REFRESH_S = 1.0


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("top", help="watch the load of a cluster, second by second")
    parser.add_argument("--once", action="store_true", help="print one second's and end, as without a terminal")
    add_connection(parser)
    parser.set_defaults(run=top)

    parser = commands.add_parser("trace", help="where the time of a request went, for ui.perfetto.dev")
    parser.add_argument("request", nargs="?", default="", help="its id (default: all requests that ended lately)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write there (default: standard output)")
    add_connection(parser)
    parser.set_defaults(run=trace)


def top(arguments: argparse.Namespace) -> int:
    console = Console()
    watch = Watch(endpoints(arguments), credentials(arguments))
    try:
        before = watch.look()
        if arguments.once or not console.is_terminal:
            time.sleep(REFRESH_S)
            console.print(frame(before, watch.look()))
            return 0
        with Live(frame(before, before), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(REFRESH_S)
                now = watch.look()
                live.update(frame(before, now), refresh=True)
                before = now
    except KeyboardInterrupt:
        return 0
    finally:
        watch.close()


def trace(arguments: argparse.Namespace) -> int:
    check_output("output", arguments.output)
    content = _find_trace(arguments)
    if arguments.output is None:
        print(content)
        return 0
    arguments.output.write_text(content)
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
