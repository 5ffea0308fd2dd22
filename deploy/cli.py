"""The `splitserve` command.

Exit status: 0 done, 1 failed, 2 the command's or the request's own fault, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from splitserve import __version__
from splitserve.client import SplitserveClientError
from splitserve.cluster.errors import SplitserveError
from splitserve.deploy.bench import command as bench
from splitserve.deploy.commands import ask, inspection, keys, lifecycle, operations, watch

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = make_parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
    except (SplitserveError, SplitserveClientError) as error:
        print(f"splitserve: error: {error}", file=sys.stderr)
        return 2 if error.code == "INVALID_ARGUMENT" else 1
    except BrokenPipeError:  # whoever read this has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"splitserve: error: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return status


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="splitserve", description="serve large language models with prefill and decode on separate worker pools"
    )
    parser.add_argument("--version", action="version", version=f"splitserve {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (lifecycle, operations, watch, ask, bench, inspection, keys):
        group.add_commands(commands)
    return parser
