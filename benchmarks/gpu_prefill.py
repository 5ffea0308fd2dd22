"""Prefill of DeepSeek-V2-Lite's shapes on one GPU: chunks of 8192 tokens, random weights, no serving.

    python -m benchmarks.gpu_prefill [--profile CASE ...]

The peer is vLLM 0.26.0 in process, with prefill graphs, whose figures were measured on another H100 80GB with the same
shapes and random weights of the same kind. Its host's 8192-cubed bfloat16 product ran at 686 TFLOP/s: this host's is
measured beside it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernels.timing import graph_us, print_kernels
from benchmarks.rows import Figure, Row, write
from splitserve.engine.batch import Batch
from splitserve.engine.kv_cache import KvCache
from splitserve.models.layers import SingleRank
from splitserve.models.resolve import load_model_config
from splitserve.models.weights import load_model
from splitserve.prefill_worker.runner import PrefillRunner

CASES = {"2048x16": (2048, 16), "8192x4": (8192, 4), "2048x1": (2048, 1), "8192x1": (8192, 1)}
VLLM = {"2048x16": 82_188.0, "8192x4": 76_146.0, "2048x1": 34.4, "8192x1": 74_254.0}  # tokens/s, but 2048x1: ms
CONTEXT, QUESTION = 7936, 256
VLLM_PRODUCT_TFLOPS = 686.0
CHUNK, PAGE_SIZE, PAGES, RUNS = 8192, 64, 600, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", nargs="*", default=[], choices=CASES, help="cases to show the kernels of")
    options = parser.parse_args()
    runner = load()
    peer = ("vllm's host", VLLM_PRODUCT_TFLOPS)
    write([Row("prefill", "8192-cubed bf16 product", "rate", "TFLOP/s", product(), *peer, "higher")])
    for case, (tokens, prompts) in CASES.items():
        batches = [batch(tokens, min(prompts, CHUNK // tokens)) for _ in range(max(1, tokens * prompts // CHUNK))]
        name, seconds = f"v2lite-bf16 {case}", measure(runner, batches)
        if case == "2048x1":
            write([Row("prefill", name, "ttft", "ms", milliseconds(seconds), "vllm", VLLM[case], "lower")])
        else:
            figure = Figure.of([tokens * prompts / each for each in seconds])
            write([Row("prefill", name, "throughput", "tokens/s", figure, "vllm", VLLM[case], "higher")])
        if case in options.profile:
            show_kernels(runner, batches[:1])
    name, figure = f"v2lite-bf16 {QUESTION} after {CONTEXT}", milliseconds(measure(runner, [after_prefix()]))
    write([Row("prefill", name, "ttft", "ms", figure, "none", None, "lower")])


def load() -> PrefillRunner:
    config, device = load_model_config("deepseek-v2-lite"), torch.device("cuda")
    model = load_model(
        Path(), config, dtype=torch.bfloat16, device=device, tp=SingleRank(), load_format="dummy", max_positions=8192
    )
    cache = KvCache(config.kv_layout(1, PAGE_SIZE, "bfloat16"), PAGES, device)
    torch.cuda.empty_cache()
    before, began = torch.cuda.memory_reserved(), time.perf_counter()
    runner = PrefillRunner(model, cache, device, CHUNK)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    seconds, grown = time.perf_counter() - began, (torch.cuda.memory_reserved() - before) / 2**20
    write(
        [
            Row("graph", "v2lite-bf16 prefill", "capture", "s", Figure.of([seconds]), "none", None, "lower"),
            Row("graph", "v2lite-bf16 prefill", "memory", "MiB", Figure.of([grown]), "none", None, "lower"),
        ]
    )
    return runner


def batch(tokens: int, prompts: int) -> Batch:
    """`prompts` fresh prompts on pages of their own, and the logits of the last token of each."""
    pages = -(-tokens // PAGE_SIZE)
    return Batch(
        token_ids=torch.randint(100_000, (tokens * prompts,)).tolist(),
        query_lens=[tokens] * prompts,
        starts=[0] * prompts,
        num_logits=[1] * prompts,
        num_pages=[pages] * prompts,
        pages=torch.randperm(PAGES)[: pages * prompts].tolist(),
    )


def after_prefix() -> Batch:
    """A question of QUESTION tokens behind a cached prefix of CONTEXT."""
    fresh = batch(CONTEXT + QUESTION, 1)
    return replace(fresh, token_ids=fresh.token_ids[-QUESTION:], query_lens=[QUESTION], starts=[CONTEXT])


def milliseconds(seconds: list[float]) -> Figure:
    return Figure.of([each * 1000 for each in seconds])


def measure(runner: PrefillRunner, batches: list[Batch]) -> list[float]:
    """Seconds from the first batch's start to the last one's logits, of each of RUNS runs."""
    samples: list[float] = []
    for run in range(RUNS + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for each in batches:
            logits = runner.run(each)
        logits.argmax(-1).tolist()
        if run >= 2:
            samples.append(time.perf_counter() - began)
    return samples


def product() -> Figure:
    """TFLOP/s of several products of random matrices."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def call() -> None:
        for _ in range(4):
            a @ a

    return Figure.of([2 * 8192**3 / graph_us(call, 4, 1) / 1e6 for _ in range(9)])


def show_kernels(runner: PrefillRunner, batches: list[Batch]) -> None:
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for each in batches:
            runner.run(each)
        torch.cuda.synchronize()
    print_kernels("first batch", trace)


if __name__ == "__main__":
    main()
