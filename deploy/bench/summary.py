"""Figures of a run: percentiles of what its clients saw, throughput, errors. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from splitserve.deploy.bench.measure import Outcome
from splitserve.deploy.bench.slo import Slo

PERCENTS = (50, 90, 99)


@dataclass(frozen=True)
class Distribution:
    """Seconds: the mean and the percentiles of PERCENTS; all None where there was nothing to measure."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True)
class Summary:
    """One run. Throughput counts what ended well, over `wall_s`, the time from the first request to the last end.

    TTFT: time to first token. TPOT: mean time of a request's tokens after the first message. ITL: gaps between
    messages. E2E: whole requests. `errors` counts failed requests by gRPC status name. `goodput`: requests a second
    that were within `slo`, and `within_slo` the share of all requests; None without objectives.
    """

    requests: int
    errors: dict[str, int]
    wall_s: float
    requests_per_s: float
    tokens_per_s: float
    ttft_s: Distribution
    tpot_s: Distribution
    itl_s: Distribution
    e2e_s: Distribution
    slo: Slo | None = None
    goodput: float | None = None
    within_slo: float | None = None


def summarize(outcomes: Sequence[Outcome], wall_s: float, slo: Slo | None = None) -> Summary:
    """The figures of a run of `wall_s` seconds."""
    within = None if slo is None else sum(map(slo.is_met, outcomes))
    good = [outcome for outcome in outcomes if outcome.error is None and outcome.arrivals]
    tokens = sum(count for outcome in good for _, count in outcome.arrivals)
    return Summary(
        requests=len(outcomes),
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None)),
        wall_s=wall_s,
        requests_per_s=len(good) / wall_s,
        tokens_per_s=tokens / wall_s,
        ttft_s=distribution([outcome.ttft_s for outcome in good]),
        tpot_s=distribution([tpot for outcome in good if (tpot := outcome.tpot_s) is not None]),
        itl_s=distribution([gap for outcome in good for gap in outcome.gaps_s]),
        e2e_s=distribution([outcome.arrivals[-1][0] for outcome in good]),
        slo=slo,
        goodput=None if within is None else within / wall_s,
        within_slo=None if within is None else within / max(1, len(outcomes)),
    )


def distribution(values: Sequence[float]) -> Distribution:
    if not values:
        return Distribution(None, None, None, None)
    return Distribution(sum(values) / len(values), *(percentile(values, percent) for percent in PERCENTS))


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of a non-empty sample, linear between its two nearest values."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summary_table(summary: Summary) -> Table:
    failed = ", ".join(f"{count} {code}" for code, count in summary.errors.items()) or "none"
    title = (
        f"{summary.requests} requests in {summary.wall_s:.1f} s: {summary.requests_per_s:,.2f} requests/s, "
        f"{summary.tokens_per_s:,.1f} tokens/s; failed: {failed}"
    )
    table = Table(title=title, title_justify="left", caption=_goodput(summary), caption_justify="left")
    for column in ("ms", "mean", *(f"p{percent}" for percent in PERCENTS)):
        table.add_column(column, justify="right")
    rows = {"TTFT": summary.ttft_s, "TPOT": summary.tpot_s, "ITL": summary.itl_s, "E2E": summary.e2e_s}
    for name, spread in rows.items():
        table.add_row(name, *(_ms(value) for value in (spread.mean, spread.p50, spread.p90, spread.p99)))
    return table


def _goodput(summary: Summary) -> str | None:
    if summary.goodput is None or summary.within_slo is None:
        return None
    return f"goodput {summary.goodput:,.2f} requests/s: {summary.within_slo:.1%} are within {summary.slo}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"
