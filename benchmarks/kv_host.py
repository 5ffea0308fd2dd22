"""How fast KV moves between two processes of one host, over shared memory and over TCP.

A prefill rank in a child process sends all layers of prompts to a decode rank in this one; a copy of as many bytes
within one process is the peer. Both have a worker's environment. Needs two cores.

    python -m benchmarks.kv_host
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.rows import Figure, Row, write
from splitserve.cluster.codec import pack, unpack
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import HandOff, RankEndpoint, Ticket
from splitserve.deploy.running_unit import ALLOCATOR
from splitserve.engine.kv_cache import KvCache
from splitserve.kv_transfer.mover import HostMover
from splitserve.kv_transfer.protocol import Freed, Incoming, ReceiveFailed, Verified
from splitserve.kv_transfer.receiver import KvReceiver
from splitserve.kv_transfer.sender import KvSender
from splitserve.kv_transfer.shm import HostSender, ShmReceiver, ShmSegment, host_id
from splitserve.kv_transfer.staging import window_size
from splitserve.kv_transfer.tcp import TcpReceiver, TcpSender

SHAPES = {
    "SmolLM2-135M float32": KvLayout(1, 30, 2, 3, 64, 16, "float32"),
    "Llama-3.1-8B bfloat16": KvLayout(1, 32, 2, 8, 128, 16, "bfloat16"),
}
TOKENS, WINDOW_BYTES, LEASE_S = 1024, 16 << 20, 30.0
ENVIRONMENT = {**ALLOCATOR, "OMP_NUM_THREADS": "1"}  # of a worker with one thread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.kv_host", *sys.argv[1:]], os.environ | ENVIRONMENT)
    for shape, layout in SHAPES.items():
        copied = copy_speed(layout, repeats)
        for transport in ("shm", "tcp"):
            case, speed = (
                f"{shape}, {TOKENS} tokens, {transport}",
                Figure.of(transfer_speeds(layout, transport, repeats)),
            )
            write([Row("kv_host", case, "throughput", "GB/s", speed, "copy", copied, "higher")])


def copy_speed(layout: KvLayout, repeats: int) -> float:
    """GB/s of copying one prompt's bytes from one place in memory to another."""
    source = torch.ones(layout.bytes_per_token * TOKENS, dtype=torch.uint8)
    target = torch.zeros_like(source)
    begin = time.perf_counter()
    for _ in range(repeats):
        target.copy_(source)
    return repeats * source.numel() / (time.perf_counter() - begin) / 1e9


def transfer_speeds(layout: KvLayout, transport: str, repeats: int) -> list[float]:
    """GB/s of each of `repeats` transfers, from handing out the ticket until all is verified. One more warms up."""
    control = TcpReceiver("127.0.0.1")
    segment = ShmSegment("benchmark", WINDOW_BYTES)
    size = window_size(layout, TOKENS, 1, WINDOW_BYTES)
    shared = transport == "shm"
    endpoint = RankEndpoint(control.endpoint, "shm" if shared else "tcp", host_id(), segment.name, 0, size)
    cache = KvCache(layout, pages(layout)[-1] + 1, torch.device("cpu"))
    receiver = KvReceiver(HostMover(cache), 0, WINDOW_BYTES, ShmReceiver(control, segment), time.monotonic)
    try:
        with sender_process() as child:
            seconds = [receive(receiver, layout, endpoint, epoch, child) for epoch in range(repeats + 1)]
    finally:
        receiver.close()
    return [layout.bytes_per_token * TOKENS / each / 1e9 for each in seconds[1:]]


def receive(
    receiver: KvReceiver, layout: KvLayout, endpoint: RankEndpoint, epoch: int, child: subprocess.Popen[str]
) -> float:
    ticket = Ticket(f"prompt-{epoch}/0", epoch, layout, 0, TOKENS, LEASE_S, (endpoint,))
    receiver.open(
        Incoming(
            transfer_id=ticket.transfer_id,
            epoch=epoch,
            source=layout,
            start_token=0,
            stop_token=TOKENS,
            pages=pages(layout),
            window_offset=endpoint.window_offset,
            window_bytes=endpoint.window_bytes,
            lease_s=LEASE_S,
        )
    )
    begin = time.perf_counter()
    assert child.stdin is not None
    child.stdin.write(pack(ticket).hex() + "\n")
    child.stdin.flush()
    seconds = 0.0
    while True:
        for event in receiver.poll():
            match event:
                case Verified():
                    seconds = time.perf_counter() - begin
                    receiver.commit(ticket.transfer_id)
                case ReceiveFailed():
                    raise RuntimeError(event.reason)
                case Freed():
                    return seconds


@contextmanager
def sender_process() -> Iterator[subprocess.Popen[str]]:
    code = "from benchmarks.kv_host import send_all; send_all()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def send_all() -> None:
    """The child: send the KV of every ticket that comes in on standard input."""
    sender: KvSender | None = None
    for line in sys.stdin:
        ticket: Ticket = unpack(bytes.fromhex(line))
        if sender is None:
            cache = KvCache(ticket.layout, pages(ticket.layout)[-1] + 1, torch.device("cpu"))
            sender = KvSender(HostMover(cache), 0, HostSender(TcpSender(time.monotonic), host_id()), time.monotonic)
        sender.begin(ticket, pages(ticket.layout))
        for layer in range(ticket.layout.num_layers):
            sender.ready(ticket.transfer_id, layer, ticket.num_tokens)
        sender.finish(ticket.transfer_id, HandOff((0,)))
        while sender.active:
            sender.pump()


def pages(layout: KvLayout) -> tuple[int, ...]:
    """Every other page, as if others held those between."""
    return tuple(range(0, 2 * TOKENS // layout.page_size, 2))


if __name__ == "__main__":
    main()
