"""The CPU cluster over gRPC, on the real SmolLM2: decode against transformers, split against colocated, prefix hits.

    python -m benchmarks.cpu_cluster [decode] [split] [prefix] [start]

Run it with nothing else on the machine. Sides of a comparison take turns, so that a slow minute hits both.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import yaml

from benchmarks.rows import Figure, Row, write
from benchmarks.transformers_peer import TransformersPeer
from splitserve.client import AsyncClient, Client, Timings
from splitserve.models.resolve import resolve_model

TOPOLOGIES = Path(__file__).parent.parent / "deploy" / "topologies"
MODEL = "smollm2-135m-instruct"
THREADS = 2
ROUNDS = 5
STARTS = 6
PROMPT_TOKENS, NEW_TOKENS = 64, 64
BATCH = 16


@dataclass(frozen=True)
class Cluster:
    name: str
    address: str
    ready_s: float


@contextmanager
def cluster(topology: str, port: int, dtype: str = "float32") -> Iterator[Cluster]:
    """A cluster of a shipped topology, under a name and port of its own."""
    settings = yaml.safe_load((TOPOLOGIES / f"{topology}.yaml").read_text())
    settings["name"] = name = f"bench-{topology}"
    settings["model"]["dtype"] = dtype
    settings["router"] = {"grpc": f"127.0.0.1:{port}"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "topology.yaml"
        file.write_text(yaml.safe_dump(settings))
        start = time.perf_counter()
        splitserve("up", str(file))
        ready_s = time.perf_counter() - start
    try:
        yield Cluster(name, f"127.0.0.1:{port}", ready_s)
    finally:
        splitserve("down", name)


def splitserve(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "splitserve", *arguments], check=True, stdout=subprocess.DEVNULL)


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 40000), k=length)


def decode() -> None:
    """Tokens per second of one request and of 16 at once, beside `generate` on the same prompts."""
    for dtype in ("float32", "bfloat16"):
        peer = TransformersPeer(resolve_model(MODEL), dtype, THREADS)
        with cluster("cpu-demo", 50081, dtype) as running:
            rates: dict[int, list[float]] = {1: [], BATCH: []}
            peers: dict[int, list[float]] = {1: [], BATCH: []}
            for round_number in range(ROUNDS + 1):
                for batch in (1, BATCH):
                    prompts = [prompt(PROMPT_TOKENS, seed=1000 * round_number + index) for index in range(batch)]
                    ours = asyncio.run(seconds_for(running.address, prompts))
                    theirs = peer.generate(prompts, NEW_TOKENS)
                    if round_number:  # the first one warms both up
                        rates[batch].append(batch * NEW_TOKENS / ours)
                        peers[batch].append(batch * NEW_TOKENS / theirs)
        peer.close()
        rows = [
            throughput(f"smollm2-135m {dtype} concurrency={batch}", rates[batch], "transformers", peers[batch])
            for batch in (1, BATCH)
        ]
        case = f"smollm2-135m {dtype} concurrency={BATCH}"
        write([*rows, throughput(case, rates[BATCH], "splitserve concurrency=1", rates[1])])


async def seconds_for(address: str, prompts: list[list[int]]) -> float:
    """Seconds until all of `prompts`, sent at once, have NEW_TOKENS tokens."""
    async with AsyncClient(address) as client:
        start = time.perf_counter()
        streams = [client.generate(ids, max_tokens=NEW_TOKENS, ignore_eos=True) for ids in prompts]
        completions = await asyncio.gather(*(stream.result() for stream in streams))
        seconds = time.perf_counter() - start
    assert all(len(completion.samples[0].token_ids) == NEW_TOKENS for completion in completions)
    return seconds


def throughput(case: str, values: list[float], peer: str, peer_values: list[float]) -> Row:
    return Row("decode", case, "throughput", "tokens/s", Figure.of(values), peer, median(peer_values), "higher")


def split() -> None:
    """TTFT and TPOT of a 512-token prompt, on a prefill and a decode worker against one that does both.

    One and the same cluster is up to a fifth faster or slower from start to start, so that it takes several starts.
    """
    two_timings: list[Timings] = []
    one_timings: list[Timings] = []
    for start_number in range(STARTS):
        with cluster("cpu-demo", 50082) as two, cluster("cpu-colocated", 50083) as one:
            for round_number in range(ROUNDS + 1):
                ids = prompt(512, seed=100 * start_number + round_number)
                timings = [measure(side.address, ids) for side in (two, one)]
                if round_number:
                    two_timings.append(timings[0])
                    one_timings.append(timings[1])
    metrics: dict[str, Callable[[Timings], float]] = {
        "ttft": lambda timing: timing.ttft_s,
        "tpot": lambda timing: timing.tpot_s,
    }
    case = "smollm2-135m float32 prompt=512"
    for metric, pick in metrics.items():
        ours, theirs = ([1000 * pick(timing) for timing in timings] for timings in (two_timings, one_timings))
        write([Row("split", case, metric, "ms", Figure.of(ours), "splitserve colocated", median(theirs), "lower")])


def measure(address: str, ids: list[int]) -> Timings:
    client = Client(address)
    timings = client.generate(ids, max_tokens=32, ignore_eos=True).result().summary.timings
    client.close()
    return timings


def prefix() -> None:
    """TTFT of prompts of which 90% is cached, against prompts of which nothing is."""
    cold, warm = [], []
    with cluster("cpu-demo", 50084) as running:
        for round_number in range(ROUNDS + 1):
            shared = prompt(1152, seed=10_000 + round_number)  # 18 pages of 64
            first = measure(running.address, shared + prompt(128, seed=round_number))
            second = measure(running.address, shared + prompt(128, seed=20_000 + round_number))
            if round_number:
                cold.append(1000 * first.ttft_s)
                warm.append(1000 * second.ttft_s)
    case = "smollm2-135m float32 prompt=1280 cached=90%"
    write([Row("prefix", case, "ttft", "ms", Figure.of(warm), "splitserve cached=0%", median(cold), "lower")])


def start() -> None:
    """Seconds from `splitserve up` to ready, weights cached, and what each process then holds in memory."""
    times: list[float] = []
    memory: dict[str, list[float]] = {}
    for round_number in range(4):
        with cluster("cpu-demo", 50085) as running:
            measure(running.address, prompt(512, seed=0))
            if round_number:
                times.append(running.ready_s)
            for role, megabytes in resident_megabytes():
                memory.setdefault(role, []).append(megabytes)
    case = "cpu-demo second start"
    write([Row("start", case, "ready", "s", Figure.of(times), "bar", 30.0, "lower")])
    for role, bar in {"router": 300.0, "prefill": 1500.0, "decode": 1500.0}.items():
        write([Row("start", f"cpu-demo {role}", "resident", "MB", Figure.of(memory[role]), "bar", bar, "lower")])


def resident_megabytes() -> Iterator[tuple[str, float]]:
    """(pool or "router", resident megabytes) of every process of the running cluster."""
    status = [sys.executable, "-m", "splitserve", "status", "bench-cpu-demo", "--json"]
    units = json.loads(subprocess.run(status, check=True, capture_output=True).stdout)["units"]
    for worker in (worker for unit in units for worker in unit["workers"]):
        yield worker["name"].partition("/")[0], psutil.Process(worker["pid"]).memory_info().rss / 1e6


BENCHES = {"decode": decode, "split": split, "prefix": prefix, "start": start}


def main() -> None:
    for name in sys.argv[1:] or BENCHES:
        BENCHES[name]()


if __name__ == "__main__":
    main()
