"""How fast KV moves from one GPU's pages into another's, two processes of one host, beside a raw NCCL link.

A prefill rank on cuda:1 sends all layers of a prompt to a decode rank on cuda:0: packing, the way, the checksum and
scattering included, from when the KV lies in the source's pages until it is verified in the target's. The peer is
NCCL's send and receive of as many bytes, one message, between the same GPUs, in the same run: with as many channels as
our links have for the throughput, with all that it takes by itself for the time of `cuda_ipc`. For `shm`, through host
memory, it is the slower of two copies of as many bytes from and to pinned memory.

    python -m benchmarks.gpu_kv
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.kv_pair import KvWay, kv_pair
from benchmarks.rows import Figure, Row, write
from splitserve.cluster.layout import KvLayout
from splitserve.kv_transfer.nccl import CHANNELS

SHAPES = {
    "v2lite": KvLayout(1, 27, 1, 1, 576, 64, "bfloat16"),
    "llama-8b": KvLayout(1, 32, 2, 8, 128, 64, "bfloat16"),
}
TOKENS = {"128": 128, "2k": 2048, "8k": 8192, "32k": 32768}
STAGING = {"cuda_ipc": 1 << 30, "nccl": 2 << 30, "shm": 256 << 20}  # of which a transfer gets a quarter
AT_ONCE = {"64 x 16": (64, 16), "64 x 128": (64, 128), "8 x 1k": (8, 1024)}
REPEATS = 20
STORE = "tcp://127.0.0.1:29571"


def main() -> None:
    for shape, layout in SHAPES.items():
        measure_many(shape, layout, f"cuda:{torch.cuda.device_count() - 1}")
    if torch.cuda.device_count() < 2:
        raise SystemExit("prompts of their own need two GPUs")
    sizes = [layout.bytes_per_token * tokens for layout in SHAPES.values() for tokens in TOKENS.values()]
    whole = Peer("nccl", dict(zip(sizes, nccl_seconds(sizes, 0), strict=True)))
    capped = Peer(f"nccl, {CHANNELS} channels", dict(zip(sizes, nccl_seconds(sizes, CHANNELS), strict=True)))
    pinned = Peer("pinned memory", {size: pinned_seconds(size) for size in sizes})
    for shape, layout in SHAPES.items():
        measure("cuda_ipc", shape, layout, whole, capped)
        measure("nccl", shape, layout, capped, capped)
        measure("shm", shape, layout, pinned, pinned)


@dataclass(frozen=True)
class Peer:
    """What a number of bytes takes otherwise, in seconds."""

    name: str
    seconds: dict[int, float]


def measure(way: KvWay, shape: str, layout: KvLayout, of_time: Peer, of_rate: Peer) -> None:
    with kv_pair(layout, max(TOKENS.values()), way, STAGING[way] // 4, "cuda:1", "cuda:0") as pair:
        pair.link()
        for name, tokens in TOKENS.items():
            size = layout.bytes_per_token * tokens
            seconds = [pair.seconds(tokens) for _ in range(REPEATS + 3)][3:]
            times, rates = Figure.of([each * 1e3 for each in seconds]), [size / each / 1e9 for each in seconds]
            peer_ms, peer_gb = of_time.seconds[size] * 1e3, size / of_rate.seconds[size] / 1e9
            case = f"{shape} {name}, {way}"
            write(
                [
                    Row("kv", case, "hand-off", "ms", times, of_time.name, peer_ms, "lower"),
                    Row("kv", case, "throughput", "GB/s", Figure.of(rates), of_rate.name, peer_gb, "higher"),
                ]
            )


def measure_many(shape: str, layout: KvLayout, source: str) -> None:
    most = max(prompts * tokens for prompts, tokens in AT_ONCE.values())
    with kv_pair(layout, most, "cuda_ipc", STAGING["cuda_ipc"], source, "cuda:0") as pair:
        for name, (prompts, tokens) in AT_ONCE.items():
            many = [pair.seconds(tokens, prompts) * 1e3 for _ in range(REPEATS + 3)][3:]
            one = [pair.seconds(prompts * tokens) * 1e3 for _ in range(REPEATS + 3)][3:]
            case, peer = f"{shape} {name}, cuda_ipc", f"one of {prompts * tokens} tokens"
            write([Row("kv", case, "hand-off", "ms", Figure.of(many), peer, median(one), "lower")])


def pinned_seconds(size: int) -> float:
    """The median time of a copy of `size` bytes to pinned memory, or from there where that takes longer."""
    host, device = torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.empty(size, dtype=torch.uint8).cuda()
    medians = []
    for target, source in ((host, device), (device, host)):
        times = []
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        medians.append(median(times))
    return max(medians)


def nccl_seconds(sizes: list[int], channels: int) -> list[float]:
    """The median time of one send and receive of each of `sizes` bytes; 0 `channels` are as many as NCCL likes."""
    context = multiprocessing.get_context("spawn")
    results: SimpleQueue[list[float]] = context.SimpleQueue()
    ranks = [context.Process(target=_exchange, args=(rank, sizes, channels, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return results.get()


def _exchange(rank: int, sizes: list[int], channels: int, results: SimpleQueue[list[float]]) -> None:
    torch.cuda.set_device(rank)
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    if channels:
        options.config.max_ctas = channels
    dist.init_process_group("nccl", init_method=STORE, rank=rank, world_size=2, pg_options=options)
    medians = []
    for size in sizes:
        data, times = torch.empty(size, dtype=torch.uint8, device="cuda"), []
        for _ in range(REPEATS + 3):
            dist.barrier()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            dist.recv(data, 1) if rank == 0 else dist.send(data, 0)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        medians.append(median(times[3:]))
    if rank == 0:
        results.put(medians)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
