"""Prefill ranks in a process of their own: read what to send from standard input, send, and say what came of it."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from functools import partial

import torch

from splitserve.cluster.codec import unpack
from splitserve.cluster.messages import Ticket
from splitserve.engine.kv_cache import KvCache
from splitserve.kv_transfer.cuda_ipc import CudaMapping
from splitserve.kv_transfer.device_mover import DeviceMover
from splitserve.kv_transfer.mover import HostMover
from splitserve.kv_transfer.protocol import SenderEvent
from splitserve.kv_transfer.segments import Attach, HostSender
from splitserve.kv_transfer.sender import KvSender
from splitserve.kv_transfer.shm import ShmMapping, host_id
from splitserve.kv_transfer.tcp import TcpSender
from tests.kv_transfer.ranks import HAND_OFF, dense_kv, poisoned_cache, write
from tests.kv_transfer.test_hosts import SOURCE_PAGES, TOKENS


def main() -> None:
    print("up", flush=True)
    for line in sys.stdin:
        share, devices, ticket = line.split()
        send(float(share), devices.split(","), bytes.fromhex(ticket))


def send(share: float, devices: list[str], packed: bytes) -> None:
    """Send `share` of the KV from a rank on each of `devices`, and die on the spot unless that is all."""
    ticket = unpack(packed)
    assert isinstance(ticket, Ticket)
    source = replace(ticket.layout, tp=len(devices), page_size=16)
    senders = []
    for rank, device in enumerate(devices):
        cache = poisoned_cache(source, 16, torch.device(device))
        write(cache, rank, SOURCE_PAGES, dense_kv(source, TOKENS), range(TOKENS))
        senders.append(rank_sender(cache, rank))
    for sender in senders:
        sender.begin(ticket, SOURCE_PAGES)
        sender.ready([(ticket.transfer_id, int(TOKENS * share))], range(source.num_layers))
    if share < 1:
        pump(senders, seconds=0.5)
        print("half", flush=True)
        os._exit(9)
    senders[0].finish(ticket.transfer_id, HAND_OFF)
    print(pump(senders, seconds=30), flush=True)
    for sender in senders:
        sender.close()


def rank_sender(cache: KvCache, rank: int) -> KvSender:
    device = cache.layers[0].device
    attach: dict[str, Attach] = {"shm": ShmMapping}
    if device.type == "cuda":
        attach["cuda_ipc"] = partial(CudaMapping, device=device)
    transport = HostSender(TcpSender(time.monotonic), host_id(), attach, time.monotonic)
    mover = DeviceMover(cache) if device.type == "cuda" else HostMover(cache)
    return KvSender(mover, rank, transport, time.monotonic)


def pump(senders: list[KvSender], seconds: float) -> list[SenderEvent]:
    """Until each has ended, or `seconds` have passed."""
    deadline = time.monotonic() + seconds
    events: list[SenderEvent] = []
    while len(events) < len(senders) and time.monotonic() < deadline:
        for sender in senders:
            events += sender.pump()
        time.sleep(0.0002)
    return events


if __name__ == "__main__":
    main()
