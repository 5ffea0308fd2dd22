"""Bytes of strangers at the sockets that workers bind, below all messages: ZeroMQ's own protocol, spoilt.

Whatever comes, a member's message still arrives; and where there is a key, nothing of a stranger's does.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from splitserve.cluster.channel import CurveKeys
from splitserve.cluster.codec import pack
from splitserve.cluster.messages import Cancel
from splitserve.kv_transfer.protocol import KvDrained, seal
from tests.cluster.doors import ADDRESS, Door, count_within, group_door, knock, kv_door, worker_door

DOORS = {
    "worker": (worker_door, pack(Cancel("router-0-1", 1))),
    "group": (group_door, pack(Cancel("router-0-1", 1))),
    "kv": (kv_door, seal(KvDrained("r/0", 1, 0, "give it up"))),
}
CONNECTIONS = 150


def opening(mechanism: bytes) -> bytes:
    """What a client of ZMTP 3.1 says before its messages."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)
    metadata = b"\x05READY\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
    return greeting + b"\x04" + bytes([len(metadata)]) + metadata


def frame(body: bytes) -> bytes:
    return b"\x00" + bytes([len(body)]) + body


def spoilt(dice: random.Random, body: bytes) -> bytes:
    whole = bytearray(opening(dice.choice([b"NULL", b"CURVE", b"PLAIN"])) + frame(body))
    match dice.randrange(4):
        case 0:
            return dice.randbytes(dice.randrange(200))
        case 1:
            return bytes(whole[: dice.randrange(len(whole))])
        case 2:
            for _ in range(dice.randint(1, 4)):
                whole[dice.randrange(len(whole))] = dice.randrange(256)
        case 3:  # a frame that promises what never comes
            whole += b"\x02" + dice.choice([2**20, 2**40, 2**63]).to_bytes(8, "big") + dice.randbytes(50)
    return bytes(whole)


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_strangers_hold_up_nobody(door: str, keyed: bool) -> None:
    make: Callable[[ExitStack, CurveKeys | None], Door]
    make, body = DOORS[door]
    keys, dice = CurveKeys.generate() if keyed else None, random.Random(door)
    with ExitStack() as stack:
        found = make(stack, keys)
        port = int(found.address.rpartition(":")[2])
        for _ in range(CONNECTIONS):
            stranger = stack.enter_context(socket.create_connection((ADDRESS, port)))
            data = spoilt(dice, body)
            # In two parts: libzmq leaves a message that came with the end of the handshake until more comes.
            with contextlib.suppress(ConnectionError):  # it may be hung up on by then
                stranger.sendall(data[: len(opening(b""))])
                stranger.sendall(data[len(opening(b"")) :])
            if dice.random() < 0.5:
                stranger.close()
        before = count_within(found, 1, 1.0) if keyed else count_within(found, 10**6, 1.0)
        assert not (keyed and before)
        knock(stack, found, keys, body)
        assert count_within(found, before + 1, 5.0) == before + 1


def test_what_is_spoilt_was_a_message() -> None:
    _, body = DOORS["worker"]
    with ExitStack() as stack:
        found = worker_door(stack, None)
        stranger = stack.enter_context(socket.create_connection((ADDRESS, int(found.address.rpartition(":")[2]))))
        stranger.sendall(opening(b"NULL"))
        heard = b""
        while b"READY" not in heard:
            heard += stranger.recv(1000)
        stranger.sendall(frame(body))
        assert count_within(found, 1, 5.0) == 1
