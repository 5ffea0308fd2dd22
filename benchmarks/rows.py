"""Rows of benchmarks/results/*.jsonl: one JSON object a line, a figure with its spread and its peer."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import quantiles
from typing import Literal

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """Several measurements of one thing: their median, 10th and 90th percentile, and how many there are."""

    value: float
    p10: float
    p90: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Figure:
        """Raises ValueError when there is nothing to summarise."""
        if not samples:
            raise ValueError("no measurements")
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        deciles = quantiles(samples, n=10, method="inclusive")
        return cls(deciles[4], deciles[0], deciles[8], len(samples))


@dataclass(frozen=True)
class Row:
    """`peer` names what `peer_value` was measured on, in the same run: another system, a limit, another way of ours."""

    bench: str
    case: str
    metric: str
    unit: str
    figure: Figure
    peer: str
    peer_value: float | None
    better: Literal["lower", "higher"]

    def as_json(self) -> dict[str, object]:
        ratio = None if self.peer_value is None else round(self.figure.value / self.peer_value, 4)
        return {
            "bench": self.bench,
            "case": self.case,
            "metric": self.metric,
            "unit": self.unit,
            **{key: round(value, 6) for key, value in asdict(self.figure).items()},
            "peer": self.peer,
            "peer_value": None if self.peer_value is None else round(self.peer_value, 6),
            "ratio": ratio,
            "better": self.better,
            "hardware": hardware(),
            "commit": commit(),
            "command": command(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }


def write(rows: Sequence[Row]) -> None:
    """Append `rows` to the file of their bench, and show them."""
    for row in rows:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{row.bench}.jsonl").open("a") as file:
            file.write(json.dumps(row.as_json()) + "\n")
    show(rows)


def show(rows: Sequence[Row]) -> None:
    for row in rows:
        peer = "" if row.peer_value is None else f"  {row.figure.value / row.peer_value:.3f} x {row.peer}"
        spread = f"[{row.figure.p10:.4g} .. {row.figure.p90:.4g}]"
        print(
            f"{row.bench:10} {row.case:40} {row.metric:20} {row.figure.value:10.4g} {row.unit:9} {spread}{peer}",
            flush=True,
        )


@cache
def hardware() -> str:
    """The GPU if there is one, else the CPU and its cores."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
        return f"{len(gpus)} x {gpus[0]}"
    except (OSError, subprocess.CalledProcessError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else platform.machine()
        return f"{model}, {len(os.sched_getaffinity(0))} cores"


@cache
def commit() -> str:
    """The commit that was measured, marked when the tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return (found.stdout.strip() or "unknown") + ("-dirty" if dirty.stdout.strip() else "")


def command() -> str:
    module = sys.modules["__main__"].__spec__
    name = f"python -m {module.name}" if module else Path(sys.argv[0]).name
    return " ".join([name.removesuffix(".__main__"), *sys.argv[1:]])
