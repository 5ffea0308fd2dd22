"""A prefill rank in a process of its own: reads a ticket from standard input, sends, and says what came of it."""

from __future__ import annotations

import os
import sys
import time

from splitserve.cluster.codec import unpack
from splitserve.cluster.messages import Ticket
from splitserve.kv_transfer.mover import HostMover
from splitserve.kv_transfer.protocol import SenderEvent
from splitserve.kv_transfer.sender import KvSender
from splitserve.kv_transfer.shm import HostSender, host_id
from splitserve.kv_transfer.tcp import TcpSender
from tests.kv_transfer.ranks import HAND_OFF, dense_kv, poisoned_cache, write
from tests.kv_transfer.test_hosts import SOURCE, SOURCE_PAGES, TOKENS


def main(share: float) -> None:
    """Send `share` of the KV, and die on the spot unless that is all."""
    print("up", flush=True)
    ticket = unpack(bytes.fromhex(sys.stdin.readline()))
    assert isinstance(ticket, Ticket)
    cache = poisoned_cache(SOURCE, 16)
    write(cache, 0, SOURCE_PAGES, dense_kv(SOURCE, TOKENS), range(TOKENS))
    sender = KvSender(HostMover(cache), 0, HostSender(TcpSender(time.monotonic), host_id()), time.monotonic)
    sender.begin(ticket, SOURCE_PAGES)
    for layer in range(SOURCE.num_layers):
        sender.ready(ticket.transfer_id, layer, int(TOKENS * share))
    if share < 1:
        pump(sender, seconds=0.5)
        print("half", flush=True)
        os._exit(9)
    sender.finish(ticket.transfer_id, HAND_OFF)
    print(pump(sender, seconds=30), flush=True)
    sender.close()


def pump(sender: KvSender, seconds: float) -> list[SenderEvent]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if events := sender.pump():
            return events
        time.sleep(0.001)
    return []


if __name__ == "__main__":
    main(share=float(sys.argv[1]))
