"""Messages between processes of one host: whole, both ways, from this user alone, whatever the other end does."""

from __future__ import annotations

import os
import random
import resource
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from splitserve.cluster.channel import wait
from splitserve.cluster.errors import StartupError
from splitserve.kv_transfer import local
from splitserve.kv_transfer.local import LocalPeers
from splitserve.kv_transfer.protocol import MAX_HEADER_BYTES

PEER = b"the receiver"


@pytest.fixture
def name() -> str:
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
def receiver(name: str) -> Iterator[LocalPeers]:
    with closing(LocalPeers(name)) as receiver:
        yield receiver


@pytest.fixture
def sender(receiver: LocalPeers, name: str) -> Iterator[LocalPeers]:
    with closing(LocalPeers()) as sender:
        sender.connect(PEER, name)
        yield sender


def taken(peers: LocalPeers, count: int) -> list[tuple[bytes, bytes]]:
    """The next `count` messages, waited for as an engine does."""
    found: list[tuple[bytes, bytes]] = []
    deadline = time.monotonic() + 10
    while len(found) < count:
        assert time.monotonic() < deadline, found
        wait(peers.sockets, 100)
        found += peers.receive(count - len(found))
    return found


def test_messages_and_answers(receiver: LocalPeers, sender: LocalPeers) -> None:
    messages = [secrets.token_bytes(size) for size in (1, 300, MAX_HEADER_BYTES)]
    for message in messages:
        sender.send(PEER, message)
    found = taken(receiver, 3)
    assert [message for _, message in found] == messages
    assert len({caller for caller, _ in found}) == 1
    receiver.send(found[0][0], b"answer")
    assert taken(sender, 1) == [(PEER, b"answer")]
    assert (receiver.receive(8), sender.receive(8)) == ([], [])


def test_senders_take_turns_within_a_limit(receiver: LocalPeers, name: str) -> None:
    with ExitStack() as stack:
        senders = [stack.enter_context(closing(LocalPeers())) for _ in range(3)]
        for sender in senders:
            sender.connect(PEER, name)
            sender.send(PEER, b"hello")
        taken(receiver, 3)
        for sender in senders:
            for count in range(10):
                sender.send(PEER, b"%d" % count)
        found = taken(receiver, 6)
        assert sorted(message for _, message in found) == [b"0"] * 3 + [b"1"] * 3
        assert receiver.receive(0) == []
        assert len(taken(receiver, 24)) == 24


def test_what_is_longer_than_any_header_is_cut_where_that_shows(receiver: LocalPeers, sender: LocalPeers) -> None:
    sender.send(PEER, bytes(4 * MAX_HEADER_BYTES))
    assert [len(message) for _, message in taken(receiver, 1)] == [MAX_HEADER_BYTES + 1]


def test_nobody_listens(name: str) -> None:
    with closing(LocalPeers()) as sender:
        sender.connect(PEER, name)
        assert PEER not in sender


def test_two_receivers_of_one_name(receiver: LocalPeers, name: str) -> None:
    with pytest.raises(StartupError, match=f"segment {name}: another process takes its messages"):
        LocalPeers(name)


def test_other_users_are_not_heard(
    receiver: LocalPeers, sender: LocalPeers, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PEER in sender
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with closing(LocalPeers()) as stranger:
        stranger.connect(PEER, name)
        assert PEER not in stranger, "nor would this user speak to another one's process"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as stranger:
        stranger.connect(local._address(name))
        stranger.send(b"let me in")
        assert receiver.receive(8) == []
        with pytest.raises(ConnectionResetError):
            stranger.recv(1)


def test_a_receiver_that_reads_nothing_costs_its_sender_nothing(receiver: LocalPeers, sender: LocalPeers) -> None:
    began = time.monotonic()
    for _ in range(10_000):
        sender.send(PEER, bytes(1000))
    assert time.monotonic() - began < 2
    assert PEER in sender
    assert 0 < len(receiver.receive(10_000)) < 10_000
    sender.send(PEER, b"again")
    assert taken(receiver, 1)[0][1] == b"again"


def test_what_was_sent_before_an_end_closed_still_comes(receiver: LocalPeers, sender: LocalPeers) -> None:
    sender.send(PEER, b"hello")
    ((caller, _),) = taken(receiver, 1)
    receiver.send(caller, b"never read")
    sender.send(PEER, b"last words")
    sender.close()
    assert taken(receiver, 1) == [(caller, b"last words")]
    assert receiver.receive(8) == []
    assert caller not in receiver


def test_a_receiver_that_was_killed_is_forgotten(name: str) -> None:
    program = f"""
import time
from splitserve.kv_transfer.local import LocalPeers
receiver = LocalPeers({name!r})
print(flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with closing(LocalPeers()) as sender:
            sender.connect(PEER, name)
            assert PEER in sender
            process.kill()
            process.wait()
            sender.send(PEER, b"anybody?")
            assert PEER not in sender
    with closing(LocalPeers(name)):
        pass  # its address is free again


def test_no_file_descriptors_left(receiver: LocalPeers, sender: LocalPeers, name: str) -> None:
    """Who connects waits, nothing spins, and it goes on when there are some."""
    sender.send(PEER, b"first")
    taken(receiver, 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as late:
        late.connect(local._address(name))
        late.send(b"late")
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))  # which are open already
            with pytest.raises(OSError, match="Too many open files"):
                os.dup(0)
            for count in range(20):
                sender.send(PEER, b"%d" % count)
                assert [message for _, message in receiver.receive(8)] == [b"%d" % count]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert [message for _, message in taken(receiver, 1)] == [b"late"]


def test_whoever_comes_and_goes_takes_turns_too(receiver: LocalPeers, sender: LocalPeers, name: str) -> None:
    """So that a flood of them keeps no engine from its work."""
    sender.send(PEER, b"hello")
    taken(receiver, 1)
    with ExitStack() as stack:
        for _ in range(100):
            stranger = stack.enter_context(closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)))
            stranger.connect(local._address(name))
        sender.send(PEER, b"one of us")
        assert [message for _, message in receiver.receive(8)] == [b"one of us"]
        assert len(receiver._connections) <= 9


def test_a_child_that_inherits_a_connection_keeps_nobody_awake(receiver: LocalPeers, sender: LocalPeers) -> None:
    """Between fork and exec a child has them all."""
    sender.send(PEER, b"hello")
    taken(receiver, 1)
    inherited = os.dup(next(iter(sender._connections.values())).fileno())
    try:
        receiver.close()
        assert sender.receive(8) == []
        assert PEER not in sender
        assert sender._news.poll(0) == []
    finally:
        os.close(inherited)


def test_ends_that_come_and_go_leave_nothing(receiver: LocalPeers, name: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    chance = random.Random(1)
    for _ in range(200):
        with closing(LocalPeers()) as sender:
            sender.connect(PEER, name)
            for _ in range(chance.randrange(3)):
                sender.send(PEER, chance.randbytes(chance.randrange(1, 100)))
            receiver.receive(chance.randrange(4))
    while receiver.receive(64):
        pass
    assert len(os.listdir("/proc/self/fd")) == before
