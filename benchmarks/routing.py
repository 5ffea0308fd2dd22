"""What placement is worth: conversations of several turns, two prefill and two decode workers, under each policy.

    python -m benchmarks.routing [--gpu]

A trace is made from a seed: conversations begin at random times with one of a few long system prompts, each turn adds
the user's tokens and then the answer's, and the user thinks before the next one. All policies replay the same trace, on
a cluster of their own, with caches that hold a part of it. Times are the clients'. The peer is `round_robin`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from benchmarks.gpu_serve import describe, splitserve
from benchmarks.rows import Figure, Row, write
from splitserve.client import AsyncClient
from splitserve.router.policy import Policy

ADDRESS = "127.0.0.1:50097"
PEER: Policy = "round_robin"
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Trace:
    """Lengths in tokens, times in seconds: mean ones, where they vary."""

    name: str
    conversations: int
    turns: int
    systems: int
    system_tokens: int
    user_tokens: int
    answer_tokens: int
    arrivals_s: float  # within which all conversations begin
    think_s: float
    vocabulary: range


ON_CPU = Trace("smollm2", 16, 5, 4, 256, 48, 24, 30.0, 2.0, range(1000, 40000))
ON_GPUS = Trace("v2lite-bf16", 96, 6, 8, 2048, 512, 96, 12.0, 1.0, range(100_000))
CPU_TOPOLOGY: dict[str, Any] = {
    "name": "bench-routing",
    "model": {"path": "smollm2-135m-instruct", "context": 2048},
    "router": {"grpc": ADDRESS},
    "prefill": {"replicas": 2, "kv_memory": "192MiB", "threads": 1},
    "decode": {"replicas": 2, "kv_memory": "192MiB", "threads": 1},
}


@dataclass(frozen=True)
class Turn:
    """One request, as it went. `computed_tokens` were not cached where it was prefilled."""

    prefill: str
    prompt_tokens: int
    computed_tokens: int
    ttft_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on four GPUs, with DeepSeek-V2-Lite's shapes")
    trace = ON_GPUS if parser.parse_args().gpu else ON_CPU
    peers = run(trace, PEER)
    write(rows(trace, PEER, peers, peers))
    for policy in get_args(Policy):
        if policy != PEER:
            write(rows(trace, policy, run(trace, policy), peers))


def run(trace: Trace, policy: Policy) -> list[Turn]:
    with cluster(trace, policy):
        return asyncio.run(replay(trace))


@contextmanager
def cluster(trace: Trace, policy: Policy) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as name:
        settings = CPU_TOPOLOGY if trace is ON_CPU else gpu_topology(Path(name))
        settings = settings | {"router": {"grpc": ADDRESS, "policy": policy}}
        (file := Path(name) / "topology.yaml").write_text(yaml.safe_dump(settings))
        splitserve("up", str(file))
        try:
            yield
        finally:
            splitserve("down", settings["name"])


def gpu_topology(folder: Path) -> dict[str, Any]:
    one = describe(folder)
    decode = {key: value for key, value in one["decode"].items() if key != "chunk_tokens"}
    prefill = {key: value for key, value in one["decode"].items() if key != "slots"}
    cached = {"replicas": 2, "prefix_cache": True, "kv_memory": "6GiB"}  # of 10 GB, at the end, in all conversations
    return {
        "name": "bench-routing",
        "model": one["model"] | {"context": 32768},
        "hosts": {"gpus": 4},
        "prefill": prefill | cached,
        "decode": decode | {"replicas": 2, "prefix_cache": True},
        "kv_transfer": {"staging": "4GiB"},
    }


async def replay(trace: Trace) -> list[Turn]:
    systems = [tokens(random.Random(f"system {number}"), trace, trace.system_tokens) for number in range(trace.systems)]
    turns: list[Turn] = []
    async with AsyncClient(ADDRESS) as client:
        await asyncio.gather(
            *(client.generate(tokens(random.Random(n), trace, 64), max_tokens=8).result() for n in range(4))
        )
        async with asyncio.TaskGroup() as group:
            for number in range(trace.conversations):
                group.create_task(converse(client, trace, number, systems, turns))
    return turns


async def converse(
    client: AsyncClient, trace: Trace, number: int, systems: Sequence[list[int]], turns: list[Turn]
) -> None:
    source = random.Random(f"conversation {number}")
    history = list(source.choice(systems))
    await asyncio.sleep(source.uniform(0, trace.arrivals_s))
    for _ in range(source.randint(trace.turns - 2, trace.turns + 2)):
        history += tokens(source, trace, round(trace.user_tokens * source.uniform(0.5, 1.5)))
        answer_tokens = round(trace.answer_tokens * source.uniform(0.5, 1.5))
        stream = client.generate(
            history, max_tokens=answer_tokens, ignore_eos=True, temperature=0.0, timeout_s=TIMEOUT_S
        )
        sent, ttft_s = time.perf_counter(), 0.0
        async for _ in stream:
            ttft_s = ttft_s or time.perf_counter() - sent
        completion = await stream.result()
        usage, prefill = completion.summary.usage, completion.summary.prefill_engine
        turns.append(Turn(prefill, usage.prompt_tokens, usage.prompt_tokens - usage.cached_tokens, ttft_s))
        history += completion.samples[0].token_ids
        await asyncio.sleep(source.expovariate(1 / trace.think_s))


def tokens(source: random.Random, trace: Trace, count: int) -> list[int]:
    return source.choices(trace.vocabulary, k=count)


def rows(trace: Trace, policy: Policy, turns: Sequence[Turn], peers: Sequence[Turn]) -> list[Row]:
    case = f"{trace.name}, {trace.conversations} conversations, 2P2D, {policy}"

    def row(metric: str, unit: str, figure: Figure, peer: float, better: Literal["lower", "higher"]) -> Row:
        return Row("routing", case, metric, unit, figure, PEER, peer, better)

    times, others = ([turn.ttft_s * 1e3 for turn in each] for each in (turns, peers))
    return [
        row("prompt tokens found cached", "1", one(hit_rate(turns), turns), hit_rate(peers), "higher"),
        row("ttft", "ms", Figure.of(times), Figure.of(others).value, "lower"),
        row("ttft p99", "ms", one(p99(times), turns), p99(others), "lower"),
        row(
            "most computed by one of two prefill workers", "1", one(imbalance(turns), turns), imbalance(peers), "lower"
        ),
    ]


def one(value: float, turns: Sequence[Turn]) -> Figure:
    return Figure(value, value, value, len(turns))


def hit_rate(turns: Sequence[Turn]) -> float:
    prompts = sum(turn.prompt_tokens for turn in turns)
    return 1 - sum(turn.computed_tokens for turn in turns) / prompts


def p99(times: Sequence[float]) -> float:
    return sorted(times)[int(0.99 * (len(times) - 1))]


def imbalance(turns: Sequence[Turn]) -> float:
    """Tokens computed by the busiest prefill worker, of the mean."""
    computed: dict[str, int] = defaultdict(int)
    for turn in turns:
        computed[turn.prefill] += turn.computed_tokens
    return max(computed.values()) * 2 / sum(computed.values())


if __name__ == "__main__":
    main()
