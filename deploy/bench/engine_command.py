"""The `bench engine` command: what an engine does without a router in front of it."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from splitserve.cluster.errors import InvalidRequest
from splitserve.cluster.topology_file import load_topology
from splitserve.deploy.bench.engine import EngineAlone
from splitserve.deploy.bench.summary import percentile

PROFILED_STEPS = 4
PREFILL_ROUNDS = 3


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("engine", help="measure the topology's decode engine alone, in this process")
    parser.add_argument("topology", type=Path, help="YAML file; model, decode and prefill.chunk_tokens count")
    parser.add_argument("--batch", default="1,8,16", help="numbers of sequences to decode (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="tokens before the first step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="decode steps measured (default: %(default)s)")
    parser.add_argument(
        "--prompts", default="1024x1", help="prompts to compute, as tokens x number (default: %(default)s)"
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a Chrome trace of the last batch's steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.set_defaults(run=bench_engine)


def bench_engine(arguments: argparse.Namespace) -> int:
    batches = [_positive("batch", part) for part in arguments.batch.split(",")]
    shapes = [_shape(part) for part in arguments.prompts.split(",")]
    engine = EngineAlone(load_topology(arguments.topology))
    figures = [_prefill(engine, tokens, prompts) for tokens, prompts in shapes]
    figures += [_decode(engine, batch, arguments.context, arguments.steps) for batch in batches]
    Console().print(_table(engine, figures))
    if arguments.profile is not None:
        _profile(engine, batches[-1], arguments.context, arguments.profile)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _prefill(engine: EngineAlone, tokens: int, prompts: int) -> dict[str, object]:
    engine.prefill_s(prompts, tokens)  # the first one compiles kernels
    seconds = [engine.prefill_s(prompts, tokens) for _ in range(PREFILL_ROUNDS)]
    return _figures(f"prefill {tokens} x {prompts}", seconds, tokens * prompts)


def _decode(engine: EngineAlone, batch: int, context: int, steps: int) -> dict[str, object]:
    return _figures(f"decode {batch}", engine.decode_s(batch, context, steps), batch)


def _figures(case: str, seconds: list[float], tokens: int) -> dict[str, object]:
    spread = {f"p{percent}_ms": percentile(seconds, percent) * 1e3 for percent in (10, 50, 90)}
    return {"case": case, "tokens_per_s": tokens / percentile(seconds, 50), **spread}


def _table(engine: EngineAlone, figures: list[dict[str, object]]) -> Table:
    title = f"weights in {engine.load_s:.1f} s, ready in {engine.ready_s:.1f} s"
    table = Table(title=title, title_justify="left")
    for column in ("", "tokens/s", "p10 ms", "p50 ms", "p90 ms"):
        table.add_column(column, justify="right")
    for figure in figures:
        case, *numbers = figure.values()
        table.add_row(str(case), *(f"{number:,.2f}" for number in numbers))
    return table


def _profile(engine: EngineAlone, batch: int, context: int, path: Path) -> None:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with engine.decoding(batch, context, PROFILED_STEPS), profile(activities=activities) as trace:
        for _ in range(PROFILED_STEPS):
            engine.step()
    trace.export_chrome_trace(str(path))


def _positive(field: str, text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise InvalidRequest(field, text, "give whole numbers from 1 on")
    return int(text)


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", text)
    if found is None:
        raise InvalidRequest("prompts", text, "give tokens x number, such as 2048x16")
    return _positive("prompts", found[1]), _positive("prompts", found[2])
