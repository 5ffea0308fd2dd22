"""Load on a cluster, as its clients see it: requests of random tokens, when their tokens come, and figures of that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile

import numpy as np
from numpy.typing import NDArray

from benchmarks.rows import Figure
from splitserve.client import AsyncClient, SplitserveClientError
from splitserve.deploy.bench.load import LoadRequest, LoadShape, make_requests, poisson_arrivals

VOCABULARY = 100_000
SETTLE_S, TAIL_S = 3.0, 2.0
TIMEOUT_S = 60.0
SLO_TTFT_S, SLO_TPOT_S = 0.2, 0.015
RESAMPLES = 200
Samples = Sequence[NDArray[np.float64]]


@dataclass(eq=False)
class Answer:
    """How one request goes. Times are seconds of `perf_counter`; `arrivals` are (time, tokens) of each message.

    `joined_s`: seconds from prefill's answer until decode has all KV, by the router's clock. `error` is the gRPC status
    name of a request that failed.
    """

    sent: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    joined_s: float = 0.0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0][0] - self.sent

    @property
    def tpot_s(self) -> float:
        """Seconds a token after the first message. Raises ValueError for an answer of one message."""
        tpot = self.tpot_within(self.sent, float("inf"))
        if tpot is None:
            raise ValueError("one message has no time between tokens")
        return tpot

    def tpot_within(self, begin: float, end: float) -> float | None:
        """Seconds a token, of those that came from `begin` until before `end`; None when they came in one message."""
        within = [arrival for arrival in self.arrivals if begin <= arrival[0] < end]
        if len(within) < 2:
            return None
        return (within[-1][0] - within[0][0]) / sum(tokens for _, tokens in within[1:])

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for (earlier, _), (later, _) in pairwise(self.arrivals)]

    @property
    def within_slo(self) -> bool:
        return not self.error and self.ttft_s <= SLO_TTFT_S and self.tpot_s <= SLO_TPOT_S


async def ask(client: AsyncClient, request: LoadRequest, answer: Answer) -> None:
    """One request to its end, written down in `answer` as it comes."""
    answer.sent = time.perf_counter()
    stream = client.generate(
        request.prompt, max_tokens=request.max_tokens, ignore_eos=True, temperature=0.0, timeout_s=TIMEOUT_S
    )
    try:
        async for delta in stream:
            if delta.token_ids:
                answer.arrivals.append((time.perf_counter(), len(delta.token_ids)))
        answer.joined_s = (await stream.result()).summary.timings.kv_transfer_s
    except SplitserveClientError as error:
        answer.error = error.code


def requests_of(prompt_tokens: int, answer_tokens: int, count: int, seed: int) -> list[LoadRequest]:
    return make_requests(LoadShape(str(prompt_tokens), str(answer_tokens)), VOCABULARY, count, seed)


@dataclass(frozen=True)
class Load:
    """What came of requests that arrived at random, `rate` a second; those sent from `begin` to `end` count."""

    answers: list[Answer]
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def sent(self) -> list[Answer]:
        return [answer for answer in self.answers if self.begin <= answer.sent < self.end]

    @property
    def served(self) -> list[Answer]:
        """Of those that count, the ones that went well. Raises RuntimeError when there is none."""
        served = [answer for answer in self.sent if not answer.error]
        if not served:
            raise RuntimeError(f"no request went well: {sorted({answer.error for answer in self.answers})}")
        return served

    @property
    def share_within_slo(self) -> float:
        return sum(answer.within_slo for answer in self.sent) / len(self.sent)


async def poisson_load(
    client: AsyncClient, rate: float, seconds: float, prompt_tokens: int, answer_tokens: int, seed: int = 0
) -> Load:
    """Poisson arrivals before, during and after the `seconds` that count, so that all of these meet the same load."""
    until = SETTLE_S + seconds + TAIL_S
    times = list(takewhile(lambda due: due < until, poisson_arrivals(rate, seed)))
    requests = requests_of(prompt_tokens, answer_tokens, len(times), seed)
    answers = [Answer() for _ in times]
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for request, due, answer in zip(requests, times, answers, strict=True):
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            group.create_task(ask(client, request, answer))
    return Load(answers, start + SETTLE_S, start + SETTLE_S + seconds)


def figures(load: Load) -> dict[str, Figure]:
    """Times in ms, throughput in output tokens that came a second, goodput in requests within the SLO a second.

    p10 and p90 are not of requests, but of the figure itself, over resampled sets of requests (`resampled`).
    """
    served, seconds = load.served, load.seconds
    ttft = [np.array([1e3 * answer.ttft_s]) for answer in served]
    tpot = [np.array([1e3 * answer.tpot_s]) for answer in served]
    gaps = [1e3 * np.array(answer.gaps_s) for answer in served]
    good = [np.array([float(answer.within_slo)]) for answer in load.sent]
    came = [np.array([float(_tokens(answer, load.begin, load.end))]) for answer in load.answers]
    return {
        "ttft p50": resampled(ttft, percentile(50)),
        "ttft p99": resampled(ttft, percentile(99)),
        "tpot p50": resampled(tpot, percentile(50)),
        "tpot p99": resampled(tpot, percentile(99)),
        "itl p99": resampled(gaps, percentile(99)),
        "throughput": resampled(came, lambda tokens: float(tokens.sum()) / seconds),
        "goodput": resampled(good, lambda kept: float(kept.sum()) / seconds),
    }


def percentile(percent: float) -> Callable[[NDArray[np.float64]], float]:
    return lambda values: float(np.percentile(values, percent))


def resampled(samples: Samples, statistic: Callable[[NDArray[np.float64]], float]) -> Figure:
    """`statistic` of all samples, which are an array a request; p10 and p90 of what it is for as many requests, drawn
    with replacement, RESAMPLES times; n requests."""
    dice = np.random.default_rng(0)
    draws = dice.integers(len(samples), size=(RESAMPLES, len(samples)))
    spread = Figure.of([statistic(np.concatenate([samples[index] for index in draw])) for draw in draws])
    return Figure(statistic(np.concatenate(samples)), spread.p10, spread.p90, len(samples))


def _tokens(answer: Answer, begin: float, end: float) -> int:
    return sum(tokens for time, tokens in answer.arrivals if begin <= time < end)
