"""Figures of one engine alone, and traces of its steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from splitserve.cluster.topology import Topology
from splitserve.deploy.bench.engine import EngineAlone
from splitserve.deploy.bench.summary import percentile

PROFILED_STEPS = 4
PREFILL_ROUNDS = 3


@dataclass(frozen=True)
class EngineLoad:
    """`prompts` are (tokens, number) each; `batches` decode from `context` tokens on, for `steps` steps."""

    prompts: list[tuple[int, int]]
    batches: list[int]
    context: int
    steps: int


def report(topology: Topology, load: EngineLoad, trace: Path | None, figures_file: Path | None) -> None:
    """Measure, print a table, write a Chrome trace of the last batch's steps and the figures where asked to."""
    engine = EngineAlone(topology)
    figures = [_prefill(engine, tokens, prompts) for tokens, prompts in load.prompts]
    figures += [_decode(engine, batch, load.context, load.steps) for batch in load.batches]
    Console().print(_table(engine, figures))
    if trace is not None:
        _profile(engine, load.batches[-1], load.context, trace)
    if figures_file is not None:
        figures_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


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
