"""Timing that the kernel benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from torch.profiler import profile

SHOWN = 24


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


def copy_gb() -> float:
    """GB/s, read + write, of the faster of two copies: torch's, and a kernel that reads and writes every element."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copies = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return 2 * source.nbytes / min(graph_us(copy) for copy in copies) / 1e3


def print_kernels(title: str, trace: profile) -> None:
    """The kernels that took longest, and how long all took."""
    kernels = sorted(trace.key_averages(), key=lambda kernel: -kernel.device_time_total)
    total = sum(kernel.device_time_total for kernel in kernels)
    print(f"{title}: {total / 1e3:.2f} ms in {sum(kernel.count for kernel in kernels)} kernels")
    for kernel in kernels[:SHOWN]:
        print(f"  {kernel.device_time_total:9.1f} us {kernel.count:4} x {kernel.key[:90]}", flush=True)
