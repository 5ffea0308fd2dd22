"""Timing that the kernel benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch


def graph_us(call: Callable[[], object], calls: int = 1, replays: int = 5) -> float:
    """Median time of one of the `calls` that `call` makes, in a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    samples: list[float] = []
    for replay in range(replays + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay:
            samples.append(start.elapsed_time(end) * 1000 / calls)
    return median(samples)
