"""How fast KV moves from one GPU's pages into another's, two processes of one host, beside a raw NCCL link.

A prefill rank on cuda:1 sends all layers of a prompt to a decode rank on cuda:0: packing, the way, the checksum and
scattering included, from when the KV lies in the source's pages until it is verified in the target's. The peer is
NCCL's send and receive of as many bytes, one message, between the same GPUs, in the same run.

    python -m benchmarks.gpu_kv
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.queues import SimpleQueue
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.kv_pair import kv_pair
from benchmarks.rows import Figure, Row, write
from splitserve.cluster.layout import KvLayout

SHAPES = {
    "v2lite": KvLayout(1, 27, 1, 1, 576, 64, "bfloat16"),
    "llama-8b": KvLayout(1, 32, 2, 8, 128, 64, "bfloat16"),
}
TOKENS = {"128": 128, "2k": 2048, "8k": 8192, "32k": 32768}
STAGING, REPEATS = 1 << 30, 20  # of which a transfer gets a quarter, as in a cluster
STORE = "tcp://127.0.0.1:29571"


def main() -> None:
    if torch.cuda.device_count() < 2:
        raise SystemExit("this benchmark needs two GPUs")
    sizes = [layout.bytes_per_token * tokens for layout in SHAPES.values() for tokens in TOKENS.values()]
    raw = dict(zip(sizes, nccl_seconds(sizes), strict=True))
    for shape, layout in SHAPES.items():
        with kv_pair(layout, max(TOKENS.values()), "cuda_ipc", STAGING // 4, "cuda:1", "cuda:0") as pair:
            for name, tokens in TOKENS.items():
                size = layout.bytes_per_token * tokens
                seconds = [pair.seconds(tokens) for _ in range(REPEATS + 3)][3:]
                times, rates = Figure.of([each * 1e3 for each in seconds]), [size / each / 1e9 for each in seconds]
                peer_ms, peer_gb = raw[size] * 1e3, size / raw[size] / 1e9
                case = f"{shape} {name}, cuda_ipc"
                write(
                    [
                        Row("kv", case, "hand-off", "ms", times, "nccl", peer_ms, "lower"),
                        Row("kv", case, "throughput", "GB/s", Figure.of(rates), "nccl", peer_gb, "higher"),
                    ]
                )


def nccl_seconds(sizes: list[int]) -> list[float]:
    """The median time of one send and receive of each of `sizes` bytes."""
    context = multiprocessing.get_context("spawn")
    results: SimpleQueue[list[float]] = context.SimpleQueue()
    ranks = [context.Process(target=_exchange, args=(rank, sizes, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return results.get()


def _exchange(rank: int, sizes: list[int], results: SimpleQueue[list[float]]) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=STORE, rank=rank, world_size=2, device_id=torch.device("cuda", rank))
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
