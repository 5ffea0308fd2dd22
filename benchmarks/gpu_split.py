"""One prefill and one decode GPU against two colocated replicas, and vLLM's figures of both: DeepSeek-V2-Lite's shapes.

    python -m benchmarks.gpu_split [unloaded] [interference] [loads] [--rates RATE ...] [--seconds S] [--modes MODE ...]

A cluster of either kind, random weights, greedy, no prefix cache, answers requests that this process sends over gRPC.
Loads are Poisson arrivals of 2048 prompt and 128 answer tokens, at the same times in both; a mode's rates end when
fewer than half of its requests keep the SLO. `split_load.figures` says what the figures and their spreads are.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu_serve import ADDRESS, describe, splitserve
from benchmarks.split_interference import interference
from benchmarks.split_load import Answer, ask, figures, poisson_load, requests_of
from benchmarks.split_report import COLOCATED, MODES, SPLIT, Mode, Report, load_name
from benchmarks.split_unloaded import unloaded
from splitserve.client import AsyncClient

PARTS = ("unloaded", "interference", "loads")
RATES = [1.5, 12.0, 18.0, 24.0, 30.0, 36.0, 42.0]
PROMPT_TOKENS, ANSWER_TOKENS = 2048, 128
CONTEXT = 32768 + 256
SATURATED = 0.5
VLLM_HAND_OFF_MS = {12.0: 61.0, 18.0: 61.0, 24.0: 61.0}  # the least of 61 to 74 over these rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="requests a second, ascending")
    parser.add_argument("--seconds", type=float, default=14.0, help="of a load that count (default: %(default)s)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="clusters (default: both)")
    options = parser.parse_args()
    parts = options.parts or list(PARTS)
    if not set(parts) <= set(PARTS):
        parser.error(f"parts: found {' '.join(parts)}; expected some of {', '.join(PARTS)}")
    report = Report()
    gc.freeze()  # to collect what imports left takes long enough to look like a slow token
    for mode in options.modes:
        with cluster(mode):
            asyncio.run(measure(mode, parts, options.rates, options.seconds, report))
    report.show()


@contextmanager
def cluster(mode: Mode) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = topology(folder, mode)
        (folder / "topology.yaml").write_text(yaml.safe_dump(settings))
        splitserve("up", str(folder / "topology.yaml"))
        try:
            yield
        finally:
            splitserve("down", settings["name"])


def topology(folder: Path, mode: Mode) -> dict[str, Any]:
    """Two GPUs. Colocated replicas take turns: least_load would know of what they do only once a second."""
    one = describe(folder)
    common = {
        "name": "bench-gpu-split",
        "model": one["model"] | {"context": CONTEXT},
        "router": one["router"] | {"policy": "round_robin"},
        "hosts": {"gpus": 2},
    }
    if mode == COLOCATED:
        return common | {"colocated": True, "decode": one["decode"] | {"replicas": 2}}
    decode = {key: value for key, value in one["decode"].items() if key != "chunk_tokens"}
    prefill = {key: value for key, value in one["decode"].items() if key != "slots"}
    return common | {"prefill": prefill, "decode": decode, "kv_transfer": {"staging": "4GiB"}}


async def measure(mode: Mode, parts: list[str], rates: list[float], seconds: float, report: Report) -> None:
    async with AsyncClient(ADDRESS) as client:
        await warm_up(client)
        if "unloaded" in parts:
            await unloaded(client, mode, report)
        if "interference" in parts:
            await interference(client, mode, report)
        if "loads" in parts:
            await loads(client, mode, rates, seconds, report)


async def warm_up(client: AsyncClient, count: int = 64) -> None:
    async with asyncio.TaskGroup() as group:
        for request in requests_of(PROMPT_TOKENS, ANSWER_TOKENS, count, seed=count):
            group.create_task(ask(client, request, Answer()))


async def loads(client: AsyncClient, mode: Mode, rates: list[float], seconds: float, report: Report) -> None:
    for rate in rates:
        name = load_name(PROMPT_TOKENS, ANSWER_TOKENS, rate)
        load = await poisson_load(client, rate, seconds, PROMPT_TOKENS, ANSWER_TOKENS)
        report.add_load(name, rate, mode, figures(load))
        if mode == SPLIT:
            report.add_hand_off(name, load.served, VLLM_HAND_OFF_MS.get(rate))
        if failed := len(load.sent) - len(load.served):
            print(f"{name}, {mode}: {failed} of {len(load.sent)} requests failed", flush=True)
        if load.share_within_slo < SATURATED:
            break


if __name__ == "__main__":
    main()
