"""Pictures of runs: how their latencies are distributed, and what load came of which rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitserve.cluster.errors import InvalidRequest
from splitserve.deploy.bench.measure import Outcome
from splitserve.deploy.bench.output import check_output
from splitserve.deploy.bench.summary import Summary

FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Run:
    """One load as its clients saw it. `rate`: the requests a second that were asked for, where it is a number."""

    label: str
    rate: float | None
    outcomes: tuple[Outcome, ...]
    summary: Summary


PANELS: dict[str, Callable[[Outcome], list[float]]] = {
    "time to first token (TTFT), ms": lambda outcome: [outcome.ttft_s],
    "time per token after it (TPOT), ms": lambda outcome: [] if outcome.tpot_s is None else [outcome.tpot_s],
    "gaps between messages (ITL), ms": lambda outcome: outcome.gaps_s,
}


def check_plot(path: Path) -> None:
    """Raise InvalidRequest, before anything is measured, where `draw` could not."""
    if path.suffix not in FORMATS:
        raise InvalidRequest("plot", str(path), f"give a file name that ends in {', '.join(FORMATS)}")
    check_output("plot", path)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InvalidRequest("plot", str(path), "it needs matplotlib: pip install matplotlib") from error


def draw(runs: Sequence[Run], path: Path) -> None:
    """Latencies as shares of requests, a curve a run, and below them throughput and goodput."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axes, (title, values) in zip(grid.flat, PANELS.items(), strict=False):
        for run in runs:
            good = [outcome for outcome in run.outcomes if outcome.error is None and outcome.arrivals]
            _distribution(axes, sorted(1e3 * value for outcome in good for value in values(outcome)), run.label)
        axes.set(title=title, ylabel="share at most so long", xscale="log", ylim=(0, 1))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    _throughput(grid.flat[3], runs)
    figure.savefig(path)
    plt.close(figure)


def _distribution(axes: Any, values: Sequence[float], label: str) -> None:
    if values:
        axes.plot(values, [(index + 1) / len(values) for index in range(len(values))], label=label)


def _throughput(axes: Any, runs: Sequence[Run]) -> None:
    """Bars for each run: requests a second that ended well, and those within the objectives."""
    bars = {"ended well": [run.summary.requests_per_s for run in runs]}
    if runs[0].summary.slo is not None:
        bars[f"within {runs[0].summary.slo}"] = [run.summary.goodput or 0.0 for run in runs]
    places, width = range(len(runs)), 0.8 / len(bars)
    for index, (label, values) in enumerate(bars.items()):
        axes.bar([place + (index - (len(bars) - 1) / 2) * width for place in places], values, width, label=label)
    axes.set(
        title="requests/s", xticks=list(places), xticklabels=[run.label for run in runs], xlim=(-0.6, len(runs) - 0.4)
    )
    axes.legend(fontsize="small")
