"""A decode rank in this process and a prefill rank in another, which send each other KV for benchmarks."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Literal

import torch

from splitserve.cluster.codec import pack, unpack
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import HandOff, RankEndpoint, Ticket
from splitserve.engine.kv_cache import KvCache
from splitserve.kv_transfer.by_device import new_host_sender, new_linked_receiver, new_mover, new_segment
from splitserve.kv_transfer.protocol import Freed, Incoming, ReceiveFailed, Verified
from splitserve.kv_transfer.receiver import KvReceiver
from splitserve.kv_transfer.segments import SegmentReceiver
from splitserve.kv_transfer.sender import KvSender
from splitserve.kv_transfer.shm import host_id
from splitserve.kv_transfer.staging import window_size
from splitserve.kv_transfer.tcp import TcpReceiver, TcpSender

LEASE_S = 30.0
LINK_MEMORY = 512 << 20
KvWay = Literal["cuda_ipc", "shm", "nccl", "tcp"]


class KvPair:
    """Transfers of up to `tokens` tokens at once, of a `layout`, from `source` to `target`, devices."""

    def __init__(
        self,
        layout: KvLayout,
        tokens: int,
        transport: KvWay,
        window_bytes: int,
        child: subprocess.Popen[str],
        target: str,
    ) -> None:
        device, control = torch.device(target), TcpReceiver("127.0.0.1")
        segment = new_segment("shm" if transport == "tcp" else transport, "benchmark", window_bytes, device)
        self._layout, self._window_bytes, self._child, self._epoch = layout, window_bytes, child, 0
        self._linked, link = None, ""
        if transport == "nccl":
            self._linked, link = new_linked_receiver(control, segment, device, LINK_MEMORY, "127.0.0.1")
        self._endpoint = RankEndpoint(control.endpoint, transport, host_id(), segment.name, 0, 0, link)
        self._mover = new_mover(KvCache(layout, pages(layout, tokens)[-1] + 1, device))
        arrivals = SegmentReceiver(self._linked or control, segment)
        self._receiver = KvReceiver(self._mover, 0, window_bytes, arrivals, time.monotonic)

    def link(self) -> None:
        """Send small prompts until a link carries them."""
        while self._linked is not None and not any(link.state == "up" for link in self._linked.links):
            self.seconds(1)

    def seconds(self, tokens: int, prompts: int = 1) -> float:
        """From when the KV of `prompts` lies in the source's pages until it is verified in the target's."""
        window = window_size(self._layout, tokens, 1, self._window_bytes)
        tickets = []
        for prompt in range(prompts):
            self._epoch += 1
            incoming = Incoming(
                transfer_id=f"prompt-{self._epoch}/0",
                epoch=self._epoch,
                source=self._layout,
                start_token=0,
                stop_token=tokens,
                pages=pages(self._layout, tokens, prompt),
                window_offset=prompt * window,
                window_bytes=window,
                lease_s=LEASE_S,
            )
            self._receiver.open(incoming)
            endpoint = replace(self._endpoint, window_offset=incoming.window_offset, window_bytes=window)
            ends = (endpoint,)
            tickets.append(Ticket(incoming.transfer_id, self._epoch, self._layout, 0, tokens, LEASE_S, ends))
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(" ".join(pack(ticket).hex() for ticket in tickets) + "\n")
        self._child.stdin.flush()
        verified, freed = 0.0, 0
        while freed < prompts:
            for event in self._receiver.poll():
                match event:
                    case Verified():
                        verified = time.perf_counter()
                        self._receiver.commit(event.transfer_id)
                    case ReceiveFailed():
                        raise RuntimeError(event.reason)
                    case Freed():
                        freed += 1
        return verified - float(self._child.stdout.readline())

    def close(self) -> None:
        self._receiver.close()


@contextmanager
def kv_pair(
    layout: KvLayout,
    tokens: int,
    transport: KvWay,
    window_bytes: int,
    source: str = "cpu",
    target: str = "cpu",
) -> Iterator[KvPair]:
    """A `KvPair` whose prefill rank lives in a child process."""
    command = [sys.executable, "-m", "benchmarks.kv_pair", source, str(tokens)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            with closing(KvPair(layout, tokens, transport, window_bytes, child, target)) as pair:
                yield pair
        finally:
            child.kill()


def send_all(device: torch.device, tokens: int) -> None:
    """The child: send the KV of all tickets of a line of standard input, and say when it lay in its pages."""
    sender: KvSender | None = None
    for line in sys.stdin:
        tickets: list[Ticket] = [unpack(bytes.fromhex(word)) for word in line.split()]
        layout = tickets[0].layout
        if sender is None:
            transport = new_host_sender(TcpSender(time.monotonic), device, LINK_MEMORY)
            mover = new_mover(KvCache(layout, pages(layout, tokens)[-1] + 1, device))
            sender = KvSender(mover, 0, transport, time.monotonic)
        for prompt, ticket in enumerate(tickets):
            sender.begin(ticket, pages(layout, ticket.num_tokens, prompt))
        began = time.perf_counter()  # the same clock in all processes of a host
        sender.ready([(ticket.transfer_id, ticket.num_tokens) for ticket in tickets], range(layout.num_layers))
        for ticket in tickets:
            sender.finish(ticket.transfer_id, HandOff((0,)))
        while sender.active:
            sender.pump()
        print(began, flush=True)


def pages(layout: KvLayout, tokens: int, prompt: int = 0) -> tuple[int, ...]:
    """Every other page, as if others held those between, behind those of the prompts before, as long as this one."""
    count = -(-tokens // layout.page_size)
    return tuple(range(2 * count * prompt, 2 * count * (prompt + 1), 2))


if __name__ == "__main__":
    if sys.argv[1] != "cpu":
        torch.cuda.set_device(sys.argv[1])
    send_all(torch.device(sys.argv[1]), int(sys.argv[2]))
