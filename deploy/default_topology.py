"""The topology of `splitserve up --model PATH`: as much of prefill and decode as this host can hold."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

import yaml

from splitserve.models.config import ModelConfig

MAX_THREADS = 16
MAX_NAME = 40
CONTEXT, SEQUENCES = 2048, 2  # the longest sequence where a topology says nothing, and how many there is room for
CPU_KV_MIB, GPU_KV_MIB = 512, 8192  # what pools have at least


def default_topology(path: str, model: ModelConfig, cpus: int, gpus: int) -> tuple[str, str]:
    """Name and YAML of a cluster for `model`, at `path`: split over two GPUs, colocated on one, or split on the CPU."""
    stem = PurePath(path).name.removesuffix(".gguf").lower()
    name = re.sub("[^a-z0-9]+", "-", stem)[:MAX_NAME].strip("-") or "default"
    if re.fullmatch("[0-9]+(e[0-9]+)?", name):
        name = f"model-{name}"  # else YAML takes it for a number
    topology: dict[str, Any] = {"name": name, "model": {"path": path}}
    context = min(CONTEXT, model.max_position_embeddings)
    if context < CONTEXT:
        topology["model"]["context"] = context
    kv_mib = SEQUENCES * context * model.kv_bytes_per_token("bfloat16" if gpus else "float32") >> 20
    if gpus:
        pool = {"device": "cuda", "kv_memory": f"{max(GPU_KV_MIB, kv_mib)}MiB"}
        topology["model"]["dtype"] = "bfloat16"
        topology["hosts"] = {"gpus": gpus}
        topology |= {"colocated": True, "decode": pool} if gpus == 1 else {"prefill": pool, "decode": dict(pool)}
    else:
        threads = min(cpus, MAX_THREADS)
        # Prefill computes in bursts; decode waits for memory and gains little from more threads.
        memory = {"kv_memory": f"{kv_mib}MiB"} if kv_mib > CPU_KV_MIB else {}
        topology |= {"prefill": {"threads": threads} | memory, "decode": {"threads": max(1, threads // 2)} | memory}
    return name, yaml.safe_dump(topology, sort_keys=False)
