"""Draws benchmarks/results/split.png from the rows of `benchmarks.gpu_split`, with vLLM's figures beside them.

python -m benchmarks.split_plot      needs matplotlib
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS
from benchmarks.split_report import MODES, VLLM_GPU, VLLM_RATES, vllm

PANELS = {
    "TTFT, ms": ("ttft p50", "ttft p99"),
    "TPOT, ms": ("tpot p50", "tpot p99"),
    "ITL p99, ms": ("itl p99",),
    "output tokens/s": ("throughput",),
}
CASE = re.compile(r"v2lite-bf16 2048\+128, ([0-9.]+) req/s, (.+)")
Curve = list[tuple[float, float]]


def main() -> None:
    draw((RESULTS / "split.jsonl").read_text().splitlines(), RESULTS / "split.png")


def curves(lines: Iterable[str]) -> dict[tuple[str, str], Curve]:
    """(requests a second, value) of each mode and metric, on vLLM's GPUs. Of rows of one rate the last one counts."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for row in map(json.loads, lines):
        match = CASE.fullmatch(row["case"])
        if match is not None and VLLM_GPU in row["hardware"]:
            found.setdefault((match[2], row["metric"]), {})[float(match[1])] = row["value"]
    return {key: sorted(values.items()) for key, values in found.items()}


def vllm_curves() -> dict[tuple[str, str], Curve]:
    metrics = [metric for metrics in PANELS.values() for metric in metrics]
    return {
        (mode, metric): [(rate, value) for rate in VLLM_RATES if (value := vllm(rate, mode, metric)) is not None]
        for mode in MODES
        for metric in metrics
    }


def draw(lines: Iterable[str], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    systems = (("splitserve", curves(lines), "-"), ("vLLM", vllm_curves(), "--"))
    for axes, (title, metrics) in zip(grid.flat, PANELS.items(), strict=True):
        for system, found, line in systems:
            for colour, mode in enumerate(MODES):
                for metric, marker in zip(metrics, "o^", strict=False):
                    label = f"{system} {mode} {metric.partition(' ')[2]}"
                    _plot(axes, found.get((mode, metric), []), label, f"C{colour}{line}{marker}")
        axes.set(title=title, xlabel="requests/s", yscale="log" if "TTFT" in title else "linear")
        axes.legend(fontsize="small")
    figure.savefig(path)


def _plot(axes: Any, curve: Curve, label: str, style: str) -> None:
    if curve:
        axes.plot([rate for rate, _ in curve], [value for _, value in curve], style, label=label.strip(), markersize=4)


if __name__ == "__main__":
    main()
