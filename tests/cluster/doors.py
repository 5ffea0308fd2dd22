"""The sockets that workers bind, as tests knock at them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass

import zmq

from splitserve.cluster.channel import CurveKeys, Socket, WorkerChannel, secure
from splitserve.engine.group import LeaderLink
from splitserve.kv_transfer.tcp import TcpReceiver
from splitserve.kv_transfer.transport import Arrival

ADDRESS = "127.0.0.1"


@dataclass
class Door:
    """A socket that workers bind: its address, and how many messages have come in so far."""

    address: str
    arrived: Callable[[], int]


def worker_door(stack: ExitStack, keys: CurveKeys | None) -> Door:
    channel = stack.enter_context(closing(WorkerChannel(ADDRESS, keys)))
    seen: list[tuple[bytes, object]] = []

    def arrived() -> int:
        seen.extend(channel.receive())
        return len(seen) + channel.malformed

    return Door(channel.address, arrived)


def group_door(stack: ExitStack, keys: CurveKeys | None) -> Door:
    leader = stack.enter_context(closing(LeaderLink(1, ADDRESS, keys)))
    seen: list[list[bytes]] = []

    def arrived() -> int:
        while leader.socket.poll(0):
            seen.append(leader.socket.recv_multipart())
        return len(seen)

    return Door(leader.address, arrived)


def kv_door(stack: ExitStack, keys: CurveKeys | None) -> Door:
    receiver = stack.enter_context(closing(TcpReceiver(ADDRESS, keys)))
    seen: list[Arrival] = []

    def arrived() -> int:
        seen.extend(receiver.receive(100))
        return len(seen)

    return Door(receiver.endpoint, arrived)


def knock(stack: ExitStack, door: Door, keys: CurveKeys | None, data: bytes) -> Socket:
    socket: Socket = stack.enter_context(zmq.Context.instance().socket(zmq.DEALER))
    secure(socket, keys, server=False)
    socket.connect(door.address)
    socket.send(data)
    return socket


def count_within(door: Door, wanted: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while (count := door.arrived()) < wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return count
