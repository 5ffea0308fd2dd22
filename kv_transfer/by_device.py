"""What moves, sends and takes KV for a rank, by the device that its pages are on."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch

from splitserve.engine.kv_cache import KvCache
from splitserve.kv_transfer.cuda_ipc import CudaMapping, CudaSegment
from splitserve.kv_transfer.device_mover import DeviceMover
from splitserve.kv_transfer.mover import HostMover, Mover
from splitserve.kv_transfer.pinned import PinnedMapping, PinnedSegment
from splitserve.kv_transfer.segments import Attach, HostSender, Segment
from splitserve.kv_transfer.shm import ShmMapping, ShmSegment, host_id
from splitserve.kv_transfer.tcp import TcpSender


def new_mover(cache: KvCache) -> Mover:
    return DeviceMover(cache) if cache.layers[0].is_cuda else HostMover(cache)


def new_segment(transport: Literal["cuda_ipc", "shm"], cluster: str, size: int, device: torch.device) -> Segment:
    """Staging of a receiving rank. Raises InsufficientResources when there is no room for `size` bytes."""
    if transport == "cuda_ipc":
        return CudaSegment(size, device)
    return PinnedSegment(cluster, size, device) if device.type == "cuda" else ShmSegment(cluster, size)


def new_host_sender(control: TcpSender, device: torch.device) -> HostSender:
    """Reaches shared memory of this host, and from a GPU the memory of others; for all else there is `control`."""
    attach: dict[str, Attach] = {"shm": ShmMapping}
    if device.type == "cuda":
        attach = {"shm": partial(PinnedMapping, device=device), "cuda_ipc": partial(CudaMapping, device=device)}
    return HostSender(control, host_id(), attach, control.clock)
