"""The `bench engine` command: what an engine does without a router in front of it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from splitserve.cluster.errors import InvalidRequest
from splitserve.cluster.topology_file import load_topology_file
from splitserve.deploy.bench.output import check_output
from splitserve.deploy.preflight import at_model_path, check_weights


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("engine", help="measure the topology's decode engine alone, in this process")
    parser.add_argument("topology", type=Path, help="YAML file; model, decode and prefill.chunk_tokens count")
    parser.add_argument("--batch", default="1,8,16", help="numbers of sequences to decode (default: %(default)s)")
    parser.add_argument("--context", default="1024", help="tokens before the first step (default: %(default)s)")
    parser.add_argument("--steps", default="64", help="decode steps measured (default: %(default)s)")
    parser.add_argument(
        "--prompts", default="1024x1", help="prompts to compute, as tokens x number (default: %(default)s)"
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a Chrome trace of the last batch's steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.set_defaults(run=bench_engine)


def bench_engine(arguments: argparse.Namespace) -> int:
    from splitserve.deploy.bench.engine_report import EngineLoad, report  # imports torch, which parsing need not

    check_output("profile", arguments.profile)
    check_output("json", arguments.json)
    load = EngineLoad(
        prompts=[_shape(part) for part in arguments.prompts.split(",")],
        batches=[_positive("batch", part) for part in arguments.batch.split(",")],
        context=_positive("context", arguments.context),
        steps=_positive("steps", arguments.steps),
    )
    file = load_topology_file(arguments.topology)
    check_weights(file)
    with at_model_path(file):
        report(file.topology, load, arguments.profile, arguments.json)
    return 0


def _positive(field: str, text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise InvalidRequest(field, text, "give whole numbers from 1 on")
    return int(text)


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", text)
    if found is None:
        raise InvalidRequest("prompts", text, "give tokens x number, such as 2048x16")
    return _positive("prompts", found[1]), _positive("prompts", found[2])
