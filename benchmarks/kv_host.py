"""How fast KV moves between two processes of one host, over shared memory and over TCP.

A prefill rank in a child process sends all layers of prompts to a decode rank in this one; a copy of as many bytes
within one process is the peer. Both have a worker's environment. Needs two cores.

    python -m benchmarks.kv_host
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Literal

import torch

from benchmarks.kv_pair import kv_pair
from benchmarks.rows import Figure, Row, write
from splitserve.cluster.layout import KvLayout
from splitserve.deploy.running_unit import ALLOCATOR

SHAPES = {
    "SmolLM2-135M float32": KvLayout(1, 30, 2, 3, 64, 16, "float32"),
    "Llama-3.1-8B bfloat16": KvLayout(1, 32, 2, 8, 128, 16, "bfloat16"),
}
TRANSPORTS: tuple[Literal["shm", "tcp"], ...] = ("shm", "tcp")
TOKENS, WINDOW_BYTES = 1024, 16 << 20
ENVIRONMENT = {**ALLOCATOR, "OMP_NUM_THREADS": "1"}  # of a worker with one thread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.kv_host", *sys.argv[1:]], os.environ | ENVIRONMENT)
    for shape, layout in SHAPES.items():
        copied = copy_speed(layout, repeats)
        for transport in TRANSPORTS:
            with kv_pair(layout, TOKENS, transport, WINDOW_BYTES) as pair:
                seconds = [pair.seconds(TOKENS) for _ in range(repeats + 1)][1:]
            speed = Figure.of([layout.bytes_per_token * TOKENS / each / 1e9 for each in seconds])
            case = f"{shape}, {TOKENS} tokens, {transport}"
            write([Row("kv_host", case, "throughput", "GB/s", speed, "copy", copied, "higher")])


def copy_speed(layout: KvLayout, repeats: int) -> float:
    """GB/s of copying one prompt's bytes from one place in memory to another."""
    source = torch.ones(layout.bytes_per_token * TOKENS, dtype=torch.uint8)
    target = torch.zeros_like(source)
    begin = time.perf_counter()
    for _ in range(repeats):
        target.copy_(source)
    return repeats * source.numel() / (time.perf_counter() - begin) / 1e9


if __name__ == "__main__":
    main()
