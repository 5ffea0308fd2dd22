"""What moves, sends and takes KV for a rank, by the device that its pages are on."""

from __future__ import annotations

import time
from functools import partial
from typing import Literal

import torch

from splitserve.engine.group import host_store
from splitserve.engine.kv_cache import KvCache
from splitserve.kv_transfer import nccl
from splitserve.kv_transfer.cuda_ipc import CudaMapping, CudaSegment
from splitserve.kv_transfer.device_mover import DeviceMover
from splitserve.kv_transfer.linked_receiver import LinkedReceiver
from splitserve.kv_transfer.linked_sender import LinkedSender
from splitserve.kv_transfer.mover import HostMover, Mover
from splitserve.kv_transfer.pinned import PinnedMapping, PinnedSegment
from splitserve.kv_transfer.segments import Attach, HostSender, Segment
from splitserve.kv_transfer.shm import ShmMapping, ShmSegment, host_id
from splitserve.kv_transfer.tcp import TcpReceiver, TcpSender


def new_mover(cache: KvCache) -> Mover:
    return DeviceMover(cache) if cache.layers[0].is_cuda else HostMover(cache)


def new_segment(
    transport: Literal["cuda_ipc", "shm", "nccl"], cluster: str, size: int, device: torch.device
) -> Segment:
    """Staging of a receiving rank. Raises InsufficientResources when there is no room for `size` bytes."""
    if transport in ("cuda_ipc", "nccl"):
        return CudaSegment(size, device)
    return PinnedSegment(cluster, size, device) if device.type == "cuda" else ShmSegment(cluster, size)


def new_host_sender(control: TcpSender, device: torch.device, link_memory: int = 0) -> HostSender:
    """Reaches shared memory of this host, and from a GPU the memory of others.

    For all else there is `control`, and NCCL where a GPU has `link_memory` bytes for it.
    """
    if device.type == "cpu":
        return HostSender(control, host_id(), {"shm": ShmMapping}, control.clock)
    attach: dict[str, Attach] = {
        "shm": partial(PinnedMapping, device=device),
        "cuda_ipc": partial(CudaMapping, device=device),
    }
    join = partial(nccl.join, device=device)
    linked = LinkedSender(control, device, join, link_memory // nccl.PAIR_BYTES, control.clock)
    return HostSender(linked, host_id(), attach, control.clock)


def new_linked_receiver(
    control: TcpReceiver, segment: Segment, device: torch.device, link_memory: int, address: str
) -> tuple[LinkedReceiver, str]:
    """A receiver that links `control`'s senders to `segment`, and where they meet it: a store on `address`."""
    store, endpoint = host_store(address, nccl.MEET_S)
    meet = partial(nccl.meet, store, rank=nccl.RECEIVER, device=device)
    receiver = LinkedReceiver(control, segment.bytes, meet, link_memory // nccl.PAIR_BYTES, time.monotonic)
    return receiver, endpoint
