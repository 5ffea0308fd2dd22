"""Prefill ranks in a process of their own: read what to send from standard input, send, and say what came of it."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace

import torch

from splitserve.cluster.codec import unpack
from splitserve.cluster.messages import Ticket
from splitserve.kv_transfer.by_device import new_host_sender, new_mover
from splitserve.kv_transfer.linked_sender import LinkedSender
from splitserve.kv_transfer.protocol import SenderEvent
from splitserve.kv_transfer.segments import HostSender
from splitserve.kv_transfer.sender import KvSender
from splitserve.kv_transfer.tcp import TcpSender
from tests.kv_transfer.ranks import HAND_OFF, dense_kv, poisoned_cache, write
from tests.kv_transfer.test_hosts import LINK_MEMORY, SOURCE_PAGES, TOKENS


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
    senders: list[KvSender] = []
    transports: list[HostSender] = []
    for rank, device in enumerate(devices):
        cache = poisoned_cache(source, 16, torch.device(device))
        write(cache, rank, SOURCE_PAGES, dense_kv(source, TOKENS), range(TOKENS))
        transports.append(new_host_sender(TcpSender(time.monotonic), torch.device(device), LINK_MEMORY))
        senders.append(KvSender(new_mover(cache), rank, transports[-1], time.monotonic))
    for sender in senders:
        sender.begin(ticket, SOURCE_PAGES)
    if any(endpoint.link for endpoint in ticket.endpoints):
        while not all(linked(transport) for transport in transports):
            pump(senders, seconds=0.01)
    for sender in senders:
        sender.ready([(ticket.transfer_id, int(TOKENS * share))], range(source.num_layers))
    if share < 1:
        for sender in senders:
            sender.pump()  # compiles its kernel, for longer than what follows
        pump(senders, seconds=0.5)
        print("half", flush=True)
        os._exit(9)
    senders[0].finish(ticket.transfer_id, HAND_OFF)
    print(pump(senders, seconds=30), flush=True)
    for sender in senders:
        sender.close()


def linked(transport: HostSender) -> bool:
    """Whether all its links are up. Raises RuntimeError when one has failed."""
    assert isinstance(transport._control, LinkedSender)
    links = transport._control.links
    if any(link.state == "down" for link in links):
        raise RuntimeError(str([link.reason for link in links]))
    return bool(links) and all(link.state == "up" for link in links)


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
