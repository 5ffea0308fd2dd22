"""Decode steps of DeepSeek-V2-Lite's shapes on one GPU: one CUDA graph a step, random weights, greedy, no serving.

    python -m benchmarks.gpu_decode [--profile BATCH ...]

The peer is vLLM 0.26.0 in process, with CUDA graphs, whose figures were measured on another H100 80GB with the same
shapes and random weights of the same kind.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.rows import Figure, Row, write
from splitserve.decode_worker.graph import DecodeGraph
from splitserve.engine.kv_cache import KvCache
from splitserve.kernels.moe_routing import Routing, route
from splitserve.models.config import ModelConfig
from splitserve.models.decoder import Decoder
from splitserve.models.layers import SingleRank
from splitserve.models.resolve import load_model_config
from splitserve.models.weights import load_model

VLLM_MS = {1: 3.81, 8: 8.60, 32: 12.92, 64: 14.11, 128: 15.28, 256: 17.62}
BATCHES = (1, 3, 8, 17, 32, 48, 64, 65, 128, 129, 200, 256)
CAPACITIES = (16, 64, 128, 256)
CONTEXT, STEPS, PAGE_SIZE = 1024, 60, 64
Chosen = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="batch sizes to show the kernels of")
    options = parser.parse_args()
    config = load_model_config("deepseek-v2-lite")
    began = time.perf_counter()
    model, cache = load(config)
    torch.cuda.synchronize()
    print(f"dummy weights in {time.perf_counter() - began:.1f} s, {torch.cuda.memory_allocated() / 2**30:.1f} GiB")
    graphs = {capacity: capture(model, config, cache, capacity) for capacity in CAPACITIES}
    for batch in BATCHES:
        graph = graphs[next(capacity for capacity in CAPACITIES if capacity >= batch)]
        times = measure(graph, batch)
        peer = VLLM_MS.get(batch)
        case = f"v2lite-bf16 batch={batch}, context={CONTEXT}"
        rows = [Row("decode", case, "tpot", "ms", Figure.of(times), "vllm" if peer else "none", peer, "lower")]
        experts = Figure.of(experts_touched(graph, batch))
        write([*rows, Row("decode", case, "experts touched", "a layer", experts, "none", None, "lower")])
        if batch in options.profile:
            show_kernels(graph, batch)


def load(config: ModelConfig) -> tuple[Decoder, KvCache]:
    device = torch.device("cuda")
    model = load_model(
        Path(), config, dtype=torch.bfloat16, device=device, tp=SingleRank(), load_format="dummy", max_positions=8192
    )
    pages = CAPACITIES[-1] * (pages_a_slot() + 1)
    cache = KvCache(config.kv_layout(1, PAGE_SIZE, "bfloat16"), pages, device)
    for layer in cache.layers:
        layer.normal_()
    return model, cache


def pages_a_slot() -> int:
    return -(-(CONTEXT + 2 * STEPS) // PAGE_SIZE)


def capture(model: Decoder, config: ModelConfig, cache: KvCache, capacity: int) -> DecodeGraph:
    torch.cuda.empty_cache()
    before, began = torch.cuda.memory_reserved(), time.perf_counter()
    graph = DecodeGraph(model, config, cache, capacity, 2 * CONTEXT // PAGE_SIZE)
    torch.cuda.synchronize()
    grown = (torch.cuda.memory_reserved() - before) / 2**20
    seconds, case = time.perf_counter() - began, f"v2lite-bf16 capacity={capacity}"
    write(
        [
            Row("graph", case, "capture", "s", Figure.of([seconds]), "none", None, "lower"),
            Row("graph", case, "memory", "MiB", Figure.of([grown]), "none", None, "lower"),
        ]
    )
    return graph


def fill(graph: DecodeGraph, batch: int) -> None:
    """`batch` sequences of CONTEXT tokens, each on pages of its own; the other slots idle."""
    sequences = graph.sequences
    slots = len(graph.tokens)
    pages = torch.randperm(slots * pages_a_slot(), device="cuda").view(slots, -1).int()
    sequences.block_table[:, : pages.shape[1]] = pages
    sequences.lengths.zero_()
    sequences.lengths[:batch] = CONTEXT
    graph.tokens.random_(0, 100_000)


def measure(graph: DecodeGraph, batch: int) -> list[float]:
    """Milliseconds of each of STEPS steps."""
    fill(graph, batch)
    for _ in range(5):
        graph.replay()
    marks = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(STEPS + 1)
    ]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(marks)]


def experts_touched(graph: DecodeGraph, batch: int) -> list[float]:
    """How many routed experts each layer's live rows choose in one step, by running the step outside its graph."""
    fill(graph, batch)
    counts: list[float] = []

    def counting(logits: torch.Tensor, bias: torch.Tensor | None, rule: Routing, shared: int = 0) -> Chosen:
        weights, chosen = route(logits, bias, rule, shared)
        counts.append(float(len(set(chosen[:batch, : rule.top_k].flatten().tolist()))))
        return weights, chosen

    with patch("splitserve.models.mlp.route", counting), torch.inference_mode():
        graph.step()
    return counts


def show_kernels(graph: DecodeGraph, batch: int) -> None:
    fill(graph, batch)
    graph.replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        graph.replay()
        torch.cuda.synchronize()
    kernels = sorted(trace.key_averages(), key=lambda kernel: -kernel.device_time_total)
    total = sum(kernel.device_time_total for kernel in kernels)
    print(f"batch {batch}: {total / 1e3:.2f} ms in {sum(kernel.count for kernel in kernels)} kernels")
    for kernel in kernels[:24]:
        print(f"  {kernel.device_time_total:9.1f} us {kernel.count:4} x {kernel.key[:90]}", flush=True)


if __name__ == "__main__":
    main()
