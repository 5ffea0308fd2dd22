"""Decode of DeepSeek-V2-Lite's shapes by one engine on one GPU: random weights, greedy, no router.

    python -m benchmarks.gpu_decode [--profile BATCH ...]

Times are those between two messages of tokens, host work included. The peer is vLLM 0.26.0 in process, with CUDA
graphs, whose figures were measured on another H100 80GB with the same shapes and random weights of the same kind.
"""

from __future__ import annotations

import argparse
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernels.timing import print_kernels
from benchmarks.rows import Figure, Row, write
from splitserve.cluster.topology import Topology
from splitserve.decode_worker.device_loop import DecodeLoop
from splitserve.deploy.bench.engine import EngineAlone
from splitserve.kernels.moe_routing import Routing, route

VLLM_MS = {1: 3.81, 8: 8.60, 32: 12.92, 64: 14.11, 128: 15.28, 256: 17.62}
BATCHES = (1, 3, 8, 17, 32, 48, 64, 65, 128, 129, 200, 256)
CONTEXT, STEPS = 1024, 40
TOPOLOGY = {
    "name": "bench",
    "model": {"path": "deepseek-v2-lite", "dtype": "bfloat16", "load_format": "dummy", "context": 9216},
    "colocated": True,
    "decode": {
        "device": "cuda",
        "kv_memory": "20GiB",
        "slots": 256,
        "max_sequences": 512,
        "chunk_tokens": 8192,
        "prefix_cache": False,
    },
}
Chosen = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="batch sizes to show the kernels of")
    options = parser.parse_args()
    engine = EngineAlone(Topology.model_validate(TOPOLOGY))
    assert engine.loop is not None
    for batch in BATCHES:
        times = [seconds * 1e3 for seconds in engine.decode_s(batch, CONTEXT, STEPS)]
        report(batch, times, engine.loop)
        with engine.decoding(batch, CONTEXT, STEPS):
            experts = Figure.of(experts_touched(engine.loop, batch))
            write([Row("decode", case(batch), "experts touched", "a layer", experts, "none", None, "lower")])
            if batch in options.profile:
                show_kernels(engine, batch)


def case(batch: int) -> str:
    return f"v2lite-bf16 batch={batch}, context={CONTEXT}"


def report(batch: int, times: list[float], loop: DecodeLoop) -> None:
    peer = VLLM_MS.get(batch)
    host = Figure.of([step.host * 1e3 for step in loop.times])
    idle = Figure.of([100 * step.idle / (step.idle + step.device) for step in loop.times])
    write(
        [
            Row("decode", case(batch), "tpot", "ms", Figure.of(times), "vllm" if peer else "none", peer, "lower"),
            Row("graph", case(batch), "host time of a launch", "ms", host, "none", None, "lower"),
            Row("graph", case(batch), "GPU idle between steps", "%", idle, "none", None, "lower"),
        ]
    )


def experts_touched(loop: DecodeLoop, batch: int) -> list[float]:
    """How many routed experts each layer's live rows choose in one step, by running the step outside its graph."""
    counts: list[float] = []

    def counting(logits: torch.Tensor, bias: torch.Tensor | None, rule: Routing, shared: int) -> Chosen:
        weights, chosen = route(logits, bias, rule, shared)
        counts.append(float(len(set(chosen[:batch, : rule.top_k].flatten().tolist()))))
        return weights, chosen

    with patch("splitserve.models.mlp.route", counting):
        loop.graph(batch).step()
    return counts


def show_kernels(engine: EngineAlone, batch: int) -> None:
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        engine.step()
        torch.cuda.synchronize()
    print_kernels(case(batch), trace)


if __name__ == "__main__":
    main()
