"""Whether a rank's GPU can do what is asked of it, told before weights load."""

from __future__ import annotations

import torch

from splitserve.cluster.errors import StartupError
from splitserve.cluster.rank_spec import RankSpec
from splitserve.cluster.units import format_bytes
from splitserve.models.config import ModelConfig
from splitserve.models.parameters import weight_bytes

OLDEST = (9, 0)  # tensor descriptors and warp-group products came with Hopper


def check_gpu(spec: RankSpec, config: ModelConfig) -> None:
    """Raise StartupError for a GPU that is too old, or without the memory that this rank's pool asks for.

    Reserves the rank's share of the GPU: torch refuses to take more.
    """
    pool, device = spec.topology.pool(spec.role), torch.device(spec.device)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        found = f"{spec.device} is a {name} of compute capability {capability[0]}.{capability[1]}"
        raise StartupError(f"{found}; kernels need 9.0 (Hopper): use another GPU, or device: cpu")
    free, total = torch.cuda.mem_get_info(device)
    share = int(total * pool.gpu_fraction)
    weights = weight_bytes(config, spec.tp, pool.layout.ep, getattr(torch, spec.topology.model.dtype).itemsize)
    staging = spec.topology.gpu_staging(spec.role)
    if weights + pool.kv_memory + staging > min(free, share):
        section = "prefill" if spec.role == "prefill" else "decode"
        parts = f"{format_bytes(weights)} of weights and {format_bytes(pool.kv_memory + staging)} of KV"
        room = f"{format_bytes(free)} free, and a share of {format_bytes(share)}"
        raise StartupError(f"{section}.kv_memory: {parts} do not fit on {spec.device}, which has {room}; lower it")
    torch.cuda.set_per_process_memory_fraction(pool.gpu_fraction, device)
