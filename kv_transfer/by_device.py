"""What moves and sends KV for a rank, by the device that its pages are on."""

from __future__ import annotations

from functools import partial

import torch

from splitserve.engine.kv_cache import KvCache
from splitserve.kv_transfer.cuda_ipc import CudaMapping
from splitserve.kv_transfer.device_mover import DeviceMover
from splitserve.kv_transfer.mover import HostMover, Mover
from splitserve.kv_transfer.segments import Attach, HostSender
from splitserve.kv_transfer.shm import ShmMapping, host_id
from splitserve.kv_transfer.tcp import TcpSender


def new_mover(cache: KvCache) -> Mover:
    return DeviceMover(cache) if cache.layers[0].is_cuda else HostMover(cache)


def new_host_sender(control: TcpSender, device: torch.device) -> HostSender:
    """Reaches shared memory of this host, and from a GPU the memory of others; for all else there is `control`."""
    attach: dict[str, Attach] = {"shm": ShmMapping}
    if device.type == "cuda":
        attach["cuda_ipc"] = partial(CudaMapping, device=device)
    return HostSender(control, host_id(), attach, control.clock)
