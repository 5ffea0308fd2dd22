"""What prefill and decode of one cluster cost each other: decode while KV streams in, prefill while it sends.

Streams decode all along, and now and then prompts come as fast as prefill takes them. Contexts grow and steps with
them, so that a busy time is compared with the quiet ones before and after it. A prompt asks for two tokens: after a
single one nobody would wait for the rest of its KV. The step that decode takes for it counts as interference.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import cycle, pairwise
from statistics import fmean, linear_regression, median

from benchmarks.rows import Figure
from benchmarks.split_load import Answer, ask, requests_of
from benchmarks.split_report import COLOCATED, SHAPES, SPLIT, Mode, Report
from splitserve.client import AsyncClient
from splitserve.deploy.bench.load import LoadRequest
from splitserve.models.resolve import load_model_config

STREAMS, CONTEXT, STREAM_TOKENS = 32, 1024, 4000
PROMPT_TOKENS, PROMPTS, AT_ONCE = 2048, 64, 16
START_S, SETTLE_S, QUIET_S, BUSY_S, ROUNDS = 3.0, 0.5, 2.0, 2.5, 4
Span = tuple[float, float]


async def interference(client: AsyncClient, mode: Mode, report: Report) -> None:
    """Colocated: how fast a GPU computes prompts whose KV goes nowhere. Split: both sides of the hand-over."""
    if mode == COLOCATED:
        prompts = cycle(requests_of(PROMPT_TOKENS, 1, PROMPTS, seed=1))
        floods = [await flood(client, prompts, 2 * AT_ONCE) for _ in range(ROUNDS)]
        add_prefill(report, mode, [rate / 2 for rate, _ in floods])
        return
    prompts = cycle(requests_of(PROMPT_TOKENS, 2, PROMPTS, seed=1))  # nothing caches their beginnings
    streams = [Answer() for _ in range(STREAMS)]
    asked = zip(requests_of(CONTEXT, STREAM_TOKENS, STREAMS, seed=0), streams, strict=True)
    tasks = [asyncio.create_task(ask(client, request, answer)) for request, answer in asked]
    try:
        await asyncio.sleep(START_S)
        quiet, floods = [await rest()], []
        for _ in range(ROUNDS):
            floods.append(await flood(client, prompts, AT_ONCE))
            quiet.append(await rest())
        if any(task.done() or stream.arrivals[0][0] > quiet[0][0] for task, stream in zip(tasks, streams, strict=True)):
            raise RuntimeError("not all streams ran all the time")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    add_prefill(report, mode, [rate for rate, _ in floods])
    add_decode(report, streams, quiet, [span for _, span in floods])


async def rest() -> Span:
    """The time in which nothing but the streams ran."""
    await asyncio.sleep(SETTLE_S)
    begin = time.perf_counter()
    await asyncio.sleep(QUIET_S)
    return begin, time.perf_counter()


async def flood(client: AsyncClient, prompts: Iterator[LoadRequest], at_once: int) -> tuple[float, Span]:
    """Prompts that got their first tokens a second, `at_once` of them being under way, and when that was.

    First tokens come a batch at a time, so that the rate is the slope of their number over time.
    """
    begin = time.perf_counter() + SETTLE_S
    end = begin + BUSY_S
    answers: list[Answer] = []

    async def take_turns() -> None:
        while time.perf_counter() < end:
            answers.append(answer := Answer())
            await ask(client, next(prompts), answer)
            if answer.error:
                raise RuntimeError(f"a prompt failed: {answer.error}")

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(take_turns())
    times = sorted(answer.sent + answer.ttft_s for answer in answers)
    counted = [time for time in times if begin <= time < end]
    return linear_regression(counted, range(len(counted))).slope, (begin, end)


def add_prefill(report: Report, mode: Mode, rates: list[float]) -> None:
    """`rates` are prompts a second of one GPU; p10 and p90 are over floods."""
    load = f"{SHAPES} prompts of {PROMPT_TOKENS}, one GPU's prefill"
    report.add("kv", load, mode, "throughput", Figure.of([rate * PROMPT_TOKENS for rate in rates]))
    if mode == SPLIT:
        layout = load_model_config("deepseek-v2-lite").kv_layout(1, 64, "bfloat16")
        sent = [rate * PROMPT_TOKENS * layout.bytes_per_token / 1e9 for rate in rates]
        report.add("kv", load, mode, "KV sent", Figure.of(sent))


def add_decode(report: Report, streams: list[Answer], quiet: list[Span], busy: list[Span]) -> None:
    """p10 and p90 are over floods; the peer is the mean of the quiet times around each."""
    before_and_after = [fmean(pair) for pair in pairwise(tpot_ms(streams, span) for span in quiet)]
    figure = Figure.of([tpot_ms(streams, span) for span in busy])
    load = f"{SHAPES} batch={STREAMS}, KV streaming in"
    report.add("kv", load, SPLIT, "tpot", figure, ("quiet", median(before_and_after)))


def tpot_ms(streams: list[Answer], span: Span) -> float:
    """The mean over `streams` of their time a token within `span`."""
    times = [stream.tpot_within(*span) for stream in streams]
    return 1e3 * fmean(seconds for seconds in times if seconds is not None)
