"""Split against colocated, in words: which one served a load better, and what made the difference. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np
from rich.table import Table

from splitserve.client import Timings
from splitserve.deploy.bench.measure import Outcome
from splitserve.deploy.bench.plot import Run
from splitserve.deploy.bench.slo import Slo
from splitserve.deploy.bench.summary import percentile

Name = Literal["split", "colocated"]
RESAMPLES = 400
LOWEST, HIGHEST = 5, 95  # percentiles of a ratio over resampled requests: outside of 1, it is no accident
MOSTLY_WAITING = 0.5  # of the time to first token


@dataclass(frozen=True)
class Side:
    """One cluster under the load. `decode_batch`: sequences in a decode step, on average."""

    name: Name
    engines: str
    run: Run
    decode_batch: float

    @property
    def good(self) -> list[Outcome]:
        return [outcome for outcome in self.run.outcomes if outcome.error is None and outcome.arrivals]

    def values(self, of: Callable[[Outcome], float | None]) -> list[float]:
        return [value for outcome in self.good if (value := of(outcome)) is not None]

    def mean(self, of: Callable[[Timings], float]) -> float:
        """Of what the router noted of each request, in seconds."""
        return fmean([of(outcome.timings) for outcome in self.good if outcome.timings is not None] or [0.0])

    @property
    def stalls(self) -> float:
        """How much longer than the median the longest hundredth of the gaps between tokens is."""
        gaps = [gap for outcome in self.good for gap in outcome.gaps_s]
        return percentile(gaps, 99) / percentile(gaps, 50) if gaps and percentile(gaps, 50) > 0 else 1.0


@dataclass(frozen=True)
class Ratio:
    """Split's figure as a multiple of colocated's, and where it lies over resampled requests."""

    value: float
    low: float
    high: float

    @property
    def better(self) -> Name | None:
        """The one whose time is shorter; None where that may be an accident."""
        return "split" if self.high < 1 else "colocated" if self.low > 1 else None


def time_ratio(split: Sequence[float], colocated: Sequence[float]) -> Ratio | None:
    """Of the medians; None where one has no requests."""
    if not split or not colocated:
        return None
    dice = np.random.default_rng(0)
    medians = [
        np.median(dice.choice(np.array(values), (RESAMPLES, len(values))), axis=1) for values in (split, colocated)
    ]
    ratios = medians[0] / medians[1]
    value = float(np.median(split) / np.median(colocated))
    return Ratio(value, float(np.percentile(ratios, LOWEST)), float(np.percentile(ratios, HIGHEST)))


def explain(split: Side, colocated: Side) -> list[str]:
    """Sentences: the verdict, both latencies, and four causes with their figures."""
    ttft = time_ratio(*(side.values(lambda outcome: outcome.ttft_s) for side in (split, colocated)))
    tpot = time_ratio(*(side.values(lambda outcome: outcome.tpot_s) for side in (split, colocated)))
    return [
        _verdict(split, colocated, ttft, tpot),
        _latency("The first token", ttft, [side.run.summary.ttft_s.p50 for side in (split, colocated)]),
        _latency("Each token after it", tpot, [side.run.summary.tpot_s.p50 for side in (split, colocated)]),
        _queueing(split, colocated),
        _interference(split, colocated),
        _transfer(split),
        _batch(split, colocated),
    ]


def table(split: Side, colocated: Side) -> Table:
    """The figures behind the sentences, in milliseconds where nothing else is said."""
    found = Table("", split.name, colocated.name, title_justify="left")
    for column in found.columns[1:]:
        column.justify = "right"
    sides = (split, colocated)
    found.add_row("engines", *(side.engines for side in sides))
    for name, percent in (("ttft", 50), ("ttft", 99), ("tpot", 50), ("tpot", 99), ("itl", 99)):
        values = [getattr(getattr(side.run.summary, f"{name}_s"), f"p{percent}") for side in sides]
        found.add_row(f"{name.upper()} p{percent}", *map(_ms, values))
    for phase in ("queue", "prefill", "kv_transfer", "decode"):
        means = [side.mean(lambda timings, phase=phase: getattr(timings, f"{phase}_s")) for side in sides]  # type: ignore[misc]
        found.add_row(f"{phase.replace('_', ' ').replace('kv', 'KV')}, mean", *map(_ms, means))
    found.add_row("sequences a decode step", *(f"{side.decode_batch:.1f}" for side in sides))
    found.add_row("requests/s", *(f"{side.run.summary.requests_per_s:.2f}" for side in sides))
    if split.run.summary.slo is not None:
        shares = [f"{side.run.summary.goodput:.2f} ({side.run.summary.within_slo:.0%})" for side in sides]
        found.add_row("goodput, requests/s", *shares)
    failed = [sum(side.run.summary.errors.values()) for side in sides]
    if any(failed):
        found.add_row("failed", *map(str, failed))
    return found


def _verdict(split: Side, colocated: Side, ttft: Ratio | None, tpot: Ratio | None) -> str:
    slo = split.run.summary.slo
    if slo is not None:
        return _verdict_by_slo(split, colocated, slo)
    first, later = (ratio.better if ratio else None for ratio in (ttft, tpot))
    if first is None and later is None:
        return "Neither is better here: what differs is within what chance makes of as many requests."
    if first is None or later is None:
        where = "the first token" if first else "the tokens after the first"
        return f"{str(first or later).capitalize()} is better here, by {where}; the rest is the same for both."
    if first == later:
        return f"{first.capitalize()} is better here: both its first and its later tokens come sooner."
    return (
        f"It depends on what you want: {first} is sooner with the first token, {later} with all later ones. "
        "Give --slo to have it decided."
    )


def _verdict_by_slo(split: Side, colocated: Side, slo: Slo) -> str:
    dice = np.random.default_rng(0)
    shares = []
    for side in (split, colocated):
        met = np.array([slo.is_met(outcome) for outcome in side.run.outcomes], dtype=float)
        shares.append(dice.choice(met, (RESAMPLES, len(met))).mean(axis=1))
    low, high = np.percentile(shares[0] - shares[1], (LOWEST, HIGHEST))
    figures = " and ".join(
        f"{side.run.summary.within_slo:.0%} {'when ' if not index else ''}{side.name}"
        for index, side in enumerate((split, colocated))
    )
    if low <= 0 <= high:
        return f"Neither is better here: within {slo} are {figures} of the requests, which chance may make of them."
    better = split if low > 0 else colocated
    return f"{better.name.capitalize()} is better here: within {slo} are {figures} of the requests."


def _latency(what: str, ratio: Ratio | None, medians: Sequence[float | None]) -> str:
    if ratio is None:
        return f"{what}: no request went well on both."
    figures = f"{_ms(medians[0])} ms when split, {_ms(medians[1])} ms when colocated"
    if ratio.better is None:
        return f"{what} (median): {figures}: no difference that chance could not make."
    less = 1 - (ratio.value if ratio.better == "split" else 1 / ratio.value)
    return f"{what} (median): {figures}: {ratio.better} takes {less:.0%} less."


def _queueing(split: Side, colocated: Side) -> str:
    waits = [side.mean(lambda timings: timings.queue_s) for side in (split, colocated)]
    line = (
        f"Queueing: requests wait {_ms(waits[0])} ms before their prompt is computed when split, {_ms(waits[1])} ms "
        "when colocated."
    )
    first = split.mean(lambda timings: timings.ttft_s)
    if waits[0] > waits[1] and waits[0] > MOSTLY_WAITING * first:
        return f"{line} That is most of split's time to first token: fewer engines compute prompts. Give prefill more."
    if waits[1] > waits[0] and waits[1] > MOSTLY_WAITING * colocated.mean(lambda timings: timings.ttft_s):
        return (
            f"{line} That is most of colocated's time to first token: prompts wait for steps of answers, or for slots."
        )
    return line


def _interference(split: Side, colocated: Side) -> str:
    computing = [side.mean(lambda timings: timings.prefill_s) for side in (split, colocated)]
    return (
        f"Interference: of the gaps between tokens one in a hundred is {split.stalls:.1f} times the median or longer "
        f"when split, {colocated.stalls:.1f} times when colocated, where steps of answers wait for chunks of prompts. "
        f"A prompt takes {_ms(computing[0])} ms to compute when split, {_ms(computing[1])} ms when colocated."
    )


def _transfer(split: Side) -> str:
    moved, total = split.mean(lambda timings: timings.kv_transfer_s), split.mean(lambda timings: timings.total_s)
    share = moved / total if total else 0.0
    return (
        f"Transfer: {_ms(moved)} ms pass between a request's first token and the start of its decode, {share:.1%} of "
        "its time, because it is split."
    )


def _batch(split: Side, colocated: Side) -> str:
    batches = f"{split.decode_batch:.1f} sequences when split, {colocated.decode_batch:.1f} when colocated"
    line = f"Batch size: a decode step carries {batches}."
    if split.decode_batch > colocated.decode_batch:
        return f"{line} A larger batch takes longer for one step, and reads the weights once for more tokens."
    return line


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"
