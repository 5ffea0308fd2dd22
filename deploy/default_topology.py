"""The topology of `splitserve up --model PATH`: as much of prefill and decode as this host can hold."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

import yaml

MAX_THREADS = 16
MAX_NAME = 40


def default_topology(model: str, cpus: int, gpus: int) -> tuple[str, str]:
    """Name and YAML of a cluster for `model`: split over two GPUs, colocated on one, or split on the CPU."""
    stem = PurePath(model).name.removesuffix(".gguf").lower()
    name = re.sub("[^a-z0-9]+", "-", stem)[:MAX_NAME].strip("-") or "default"
    topology: dict[str, Any] = {"name": name, "model": {"path": model}}
    if gpus:
        pool = {"device": "cuda", "kv_memory": "8GiB"}
        topology["model"]["dtype"] = "bfloat16"
        topology["hosts"] = {"gpus": gpus}
        topology |= {"colocated": True, "decode": pool} if gpus == 1 else {"prefill": pool, "decode": dict(pool)}
    else:
        threads = min(cpus, MAX_THREADS)
        # Prefill computes in bursts; decode waits for memory and gains little from more threads.
        topology |= {"prefill": {"threads": threads}, "decode": {"threads": max(1, threads // 2)}}
    return name, yaml.safe_dump(topology, sort_keys=False)
