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
    pool: dict[str, Any] = {"device": "cuda", "kv_memory": "8GiB"} if gpus else {"threads": min(cpus, MAX_THREADS)}
    topology: dict[str, Any] = {"name": name, "model": {"path": model}}
    if gpus:
        topology["model"]["dtype"] = "bfloat16"
        topology["hosts"] = {"gpus": gpus}
    topology |= {"colocated": True, "decode": pool} if gpus == 1 else {"prefill": pool, "decode": dict(pool)}
    return name, yaml.safe_dump(topology, sort_keys=False)
