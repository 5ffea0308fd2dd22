"""Real sockets and real shared memory, within one process and between two."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import psutil
import pytest
import torch
import zmq

from splitserve.cluster.channel import CurveKeys
from splitserve.cluster.codec import pack
from splitserve.cluster.errors import InsufficientResources, StartupError, TransferFailed
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import RankEndpoint, Ticket
from splitserve.cluster.segment_files import FOLDER, sweep
from splitserve.engine.kv_cache import KvCache
from splitserve.kv_transfer.by_device import new_linked_receiver, new_segment
from splitserve.kv_transfer.device_mover import DeviceMover
from splitserve.kv_transfer.local import LocalPeers
from splitserve.kv_transfer.mover import HostMover
from splitserve.kv_transfer.protocol import Freed, Incoming, ReceiveFailed, ReceiverEvent, SendFailed, Sent, Verified
from splitserve.kv_transfer.receiver import KvReceiver
from splitserve.kv_transfer.segments import HostSender, SegmentReceiver, Unreachable
from splitserve.kv_transfer.sender import KvSender
from splitserve.kv_transfer.shm import ShmMapping, ShmSegment, host_id
from splitserve.kv_transfer.staging import HOST_FRAMES, FrameSizes
from splitserve.kv_transfer.tcp import MOST_BYTES, TcpReceiver, TcpSender
from tests.kv_transfer.ranks import (
    HAND_OFF,
    POISON,
    assert_same,
    dense_kv,
    expected_cache,
    layout,
    poisoned_cache,
    write,
)

ROOT = Path(__file__).parents[2]
CLUSTER = f"kvtest{os.getpid()}"
STAGING_BYTES = 1 << 20
TOKENS = 57
LINK_MEMORY = 1 << 29
SOURCE = layout(1, page_size=16)
TARGET = layout(1, page_size=5)
SOURCE_PAGES, TARGET_PAGES = [3, 1, 9, 0], [2, 15, 4, 8, 1, 0, 11, 12, 13, 5, 6, 7]


@pytest.fixture
def open_ends() -> Iterator[ExitStack]:
    """Closes what a test opens, and sees that nothing is left."""
    with ExitStack() as stack:
        yield stack
    assert not list(FOLDER.glob(f"splitserve-{CLUSTER}-*"))


def prefill_sender(
    open_ends: ExitStack, cache: KvCache | None = None, rank: int = 0, keys: CurveKeys | None = None
) -> KvSender:
    mover = HostMover(cache or poisoned_cache(SOURCE, 16))
    return open_ends.enter_context(closing(KvSender(mover, rank, host_sender(keys), time.monotonic)))


class DecodeRank:
    """A receiving rank that takes both ways, and the endpoint it would grant."""

    def __init__(
        self,
        open_ends: ExitStack,
        of: KvLayout = TARGET,
        rank: int = 0,
        transport: Literal["cuda_ipc", "shm", "nccl", "tcp"] = "shm",
        keys: CurveKeys | None = None,
        device: str = "cpu",
    ) -> None:
        control, on = TcpReceiver("127.0.0.1", keys), torch.device(device)
        segment = new_segment("shm" if transport == "tcp" else transport, CLUSTER, STAGING_BYTES, on)
        name, self.linked = "" if transport == "tcp" else segment.name, None
        self.endpoint = RankEndpoint(control.endpoint, transport, host_id(), name, 4096, 1 << 16)
        if transport == "nccl":
            self.linked, link = new_linked_receiver(control, segment, on, LINK_MEMORY, "127.0.0.1")
            self.endpoint = replace(self.endpoint, link=link)
        self.cache = poisoned_cache(of, 16, on)
        mover = HostMover(self.cache) if device == "cpu" else DeviceMover(self.cache)
        arrivals = SegmentReceiver(self.linked or control, segment)
        self.receiver = KvReceiver(mover, rank, STAGING_BYTES, arrivals, time.monotonic)
        open_ends.callback(self.receiver.close)

    def open(self, ticket: Ticket, source: KvLayout, pages: list[int]) -> None:
        self.receiver.open(
            Incoming(
                transfer_id=ticket.transfer_id,
                epoch=ticket.epoch,
                source=source,
                start_token=ticket.start_token,
                stop_token=ticket.num_tokens,
                pages=tuple(pages),
                window_offset=self.endpoint.window_offset,
                window_bytes=self.endpoint.window_bytes,
                lease_s=ticket.lease_s,
            )
        )


def grant(ranks: list[DecodeRank], of: KvLayout, lease_s: float = 20.0) -> Ticket:
    return Ticket("r/0", 7 << 32, of, 0, TOKENS, lease_s, tuple(rank.endpoint for rank in ranks))


def placed(sender: HostSender, target: RankEndpoint, offset: int, size: int) -> torch.Tensor:
    place = sender.place(target, offset, size)
    assert place is not None
    return place


def host_sender(keys: CurveKeys | None = None, host: str | None = None) -> HostSender:
    control = TcpSender(time.monotonic, keys)
    return HostSender(control, host or host_id(), {"shm": ShmMapping}, time.monotonic)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "curve"])
@pytest.mark.parametrize(("source_tp", "target_tp"), [(1, 2), (2, 1), (2, 4)])
def test_pages_arrive_bit_for_bit(
    open_ends: ExitStack, transport: Literal["shm", "tcp"], secure: bool, source_tp: int, target_tp: int
) -> None:
    keys = CurveKeys.generate() if secure else None
    source, target = layout(source_tp, page_size=16), layout(target_tp, page_size=5)
    ranks = [DecodeRank(open_ends, target, rank, transport, keys) for rank in range(target_tp)]
    ticket, dense = grant(ranks, target), dense_kv(source, TOKENS)
    senders = []
    for rank in range(source_tp):
        cache = poisoned_cache(source, 16)
        write(cache, rank, SOURCE_PAGES, dense, range(TOKENS))
        sender = prefill_sender(open_ends, cache, rank, keys)
        senders.append(sender)
        sender.begin(ticket, SOURCE_PAGES)
        sender.ready([("r/0", TOKENS)], range(source.num_layers))
    senders[0].finish("r/0", HAND_OFF)
    for decode in ranks:
        decode.open(ticket, source, TARGET_PAGES)
    sent: list[object] = []
    verified: list[ReceiverEvent] = []
    deadline = time.monotonic() + 20
    while (len(sent), len(verified)) != (source_tp, target_tp):
        assert time.monotonic() < deadline
        sent += [event for sender in senders for event in sender.pump()]
        verified += [event for decode in ranks for event in decode.receiver.poll()]
    assert sent == [Sent("r/0")] * source_tp
    assert {type(event) for event in verified} == {Verified}
    for rank, decode in enumerate(ranks):
        assert_same(decode.cache, expected_cache(target, rank, 16, TARGET_PAGES, dense, range(TOKENS)))
        assert decode.receiver.rejected == 0


def test_senders_of_this_host_shut_out_no_others(open_ends: ExitStack) -> None:
    control, segment = TcpReceiver("127.0.0.1"), ShmSegment(CLUSTER, 4096)
    receiver = open_ends.enter_context(closing(SegmentReceiver(control, segment)))
    near = open_ends.enter_context(closing(LocalPeers()))
    near.connect(b"here", segment.name)
    far = open_ends.enter_context(closing(TcpSender(time.monotonic)))
    far.send(RankEndpoint(control.endpoint, "tcp", "", "", 0, 0), b"from afar")
    headers: list[bytes] = []
    deadline = time.monotonic() + 5
    while b"from afar" not in headers:
        assert time.monotonic() < deadline
        for _ in range(8):
            near.send(b"here", b"from here")
        headers += [arrival.header for arrival in receiver.receive(8)]
    assert b"from here" in headers
    for _ in range(8):
        far.send(RankEndpoint(control.endpoint, "tcp", "", "", 0, 0), b"from afar")
        near.send(b"here", b"from here")
    time.sleep(0.2)
    assert {arrival.header for arrival in receiver.receive(8)} == {b"from here", b"from afar"}


def start_peer() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kv_transfer.host_peer"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def tell(peer: subprocess.Popen[str], ticket: Ticket, share: float = 1, devices: str = "cpu") -> None:
    assert peer.stdin is not None
    peer.stdin.write(f"{share} {devices} {pack(ticket).hex()}\n")
    peer.stdin.flush()


def poll_until(decode: DecodeRank, count: int, seconds: float) -> list[ReceiverEvent]:
    events: list[ReceiverEvent] = []
    deadline = time.monotonic() + seconds
    while len(events) < count and time.monotonic() < deadline:
        events += decode.receiver.poll()
        time.sleep(0.001)
    return events


@pytest.mark.parametrize("way", ["local", "control"])
def test_messages_within_a_host_take_either_way(
    open_ends: ExitStack, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over Unix sockets, without ZeroMQ; and the other way round where these do not reach."""
    decode = DecodeRank(open_ends)
    if way == "local":
        decode.endpoint = replace(decode.endpoint, address="tcp://127.0.0.1:9")
    else:
        monkeypatch.setattr(LocalPeers, "connect", lambda *_: None)
    sender, ticket = prefill_sender(open_ends), grant([decode], TARGET)
    decode.open(ticket, SOURCE, TARGET_PAGES)
    sender.begin(ticket, SOURCE_PAGES)
    sender.ready([("r/0", TOKENS)], range(SOURCE.num_layers))
    sender.finish("r/0", HAND_OFF)
    sent: list[object] = []
    verified: list[ReceiverEvent] = []
    deadline = time.monotonic() + 10
    while not (sent and verified):
        assert time.monotonic() < deadline
        sent += sender.pump()
        verified += decode.receiver.poll()
    assert (sent, verified) == ([Sent("r/0")], [Verified("r/0", HAND_OFF)])


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_kv_crosses_between_two_processes(open_ends: ExitStack, transport: Literal["shm", "tcp"]) -> None:
    decode = DecodeRank(open_ends, transport=transport)
    ticket = grant([decode], TARGET)
    decode.open(ticket, SOURCE, TARGET_PAGES)
    process = start_peer()
    tell(process, ticket)
    assert poll_until(decode, 1, 30) == [Verified("r/0", HAND_OFF)]
    decode.receiver.commit("r/0")
    assert poll_until(decode, 1, 10) == [Freed("r/0")]
    assert process.communicate(timeout=20)[0].strip() == str([Sent("r/0")])
    expected = expected_cache(TARGET, 0, 16, TARGET_PAGES, dense_kv(SOURCE, TOKENS), range(TOKENS))
    assert_same(decode.cache, expected)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_sender_that_dies_costs_a_lease(open_ends: ExitStack, transport: Literal["shm", "tcp"]) -> None:
    decode = DecodeRank(open_ends, transport=transport)
    ticket = grant([decode], TARGET, lease_s=2.0)
    process = start_peer()
    tell(process, ticket, share=0.5)
    decode.open(ticket, SOURCE, TARGET_PAGES)
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        assert decode.receiver.poll() == []
    assert process.communicate()[0].strip() == "half"
    assert process.returncode == 9
    assert (decode.cache.layers[0] != POISON).any(), "half of it had come"
    events = poll_until(decode, 2, 20)
    assert events == [ReceiveFailed("r/0", "no KV came for a lease of 2 s"), Freed("r/0")]
    assert decode.receiver.resident == {}


def test_tcp_alone_binds_only_the_given_address(open_ends: ExitStack) -> None:
    control = open_ends.enter_context(closing(TcpReceiver("127.0.0.1")))
    port = int(control.endpoint.rsplit(":", 1)[1])
    bound = [
        connection.laddr.ip for connection in psutil.Process().net_connections("tcp") if connection.laddr.port == port
    ]
    assert [ip.removeprefix("::ffff:") for ip in bound] == ["127.0.0.1"]


def test_an_address_that_cannot_be_bound_is_named() -> None:
    with pytest.raises(StartupError, match=r"cannot bind 192\.0\.2\.1"):
        TcpReceiver("192.0.2.1")


def test_an_address_that_is_none_is_refused(open_ends: ExitStack) -> None:
    sender = prefill_sender(open_ends)
    ticket = Ticket("r/0", 1, TARGET, 0, TOKENS, 5.0, (RankEndpoint("nowhere", "tcp", "", "", 0, 1 << 16),))
    with pytest.raises(TransferFailed, match="address: found 'nowhere'"):
        sender.begin(ticket, SOURCE_PAGES)


@pytest.mark.parametrize("segment", ["splitserve-x-1-00000000", "../../etc/passwd", ""])
def test_a_segment_that_is_not_there_is_refused(open_ends: ExitStack, segment: str) -> None:
    sender = prefill_sender(open_ends)
    endpoint = RankEndpoint("tcp://127.0.0.1:9", "shm", host_id(), segment, 0, 1 << 16)
    with pytest.raises(TransferFailed, match="segment: "):
        sender.begin(Ticket("r/0", 1, TARGET, 0, TOKENS, 5.0, (endpoint,)), SOURCE_PAGES)
    assert sender.active == ()


def test_a_window_beyond_the_segment_ends_the_transfer(open_ends: ExitStack) -> None:
    decode = DecodeRank(open_ends)
    beyond = replace(decode.endpoint, window_offset=STAGING_BYTES)
    sender = prefill_sender(open_ends)
    sender.begin(Ticket("r/0", 1, TARGET, 0, TOKENS, 5.0, (beyond,)), SOURCE_PAGES)
    sender.ready([("r/0", TOKENS)], range(SOURCE.num_layers))
    (event,) = sender.pump()
    assert isinstance(event, SendFailed)
    assert f"has {STAGING_BYTES} bytes; a frame ends at" in event.reason


def test_another_host_gets_its_payload_over_tcp(open_ends: ExitStack) -> None:
    decode = DecodeRank(open_ends)
    sender = open_ends.enter_context(closing(host_sender(host="another host")))
    payload = placed(sender, decode.endpoint, 4096, 64)
    sender.send(decode.endpoint, b"header", payload.fill_(5))
    transport = decode.receiver._transport
    while not (arrivals := transport.receive(1)):
        time.sleep(0.001)
    assert torch.equal(transport.take(arrivals[0], 4096, 64), torch.full((64,), 5, dtype=torch.uint8))
    with pytest.raises(TransferFailed, match="found 64 bytes, expected 32"):
        transport.take(arrivals[0], 4096, 32)


def test_what_is_taken_from_shared_memory_no_longer_changes(open_ends: ExitStack) -> None:
    decode = DecodeRank(open_ends)
    sender = open_ends.enter_context(closing(host_sender()))
    sender.send(decode.endpoint, b"header", placed(sender, decode.endpoint, 4096, 64).fill_(5))
    transport = decode.receiver._transport
    while not (arrivals := transport.receive(1)):
        time.sleep(0.001)
    taken = transport.take(arrivals[0], 4096, 64)
    placed(sender, decode.endpoint, 4096, 64).fill_(6)
    assert taken.tolist() == [5] * 64


class Somewhere:
    """A segment that a test lends to a sender."""

    def __init__(self, name: str) -> None:
        self.bytes, self.frame_sizes, self.closed = torch.zeros(4096, dtype=torch.uint8), FrameSizes(64, 1024), False

    def close(self) -> None:
        self.closed = True


def on_a_gpu(decode: DecodeRank) -> RankEndpoint:
    return replace(decode.endpoint, transport="cuda_ipc", segment="cuda-00")


def test_a_segment_without_a_way_to_it_gets_its_payload_over_tcp(open_ends: ExitStack) -> None:
    asked: list[str] = []

    def refuse(name: str) -> Somewhere:
        asked.append(name)
        raise Unreachable("segment: no way")

    decode = DecodeRank(open_ends)
    sender = HostSender(TcpSender(time.monotonic), host_id(), {"cuda_ipc": refuse}, time.monotonic)
    open_ends.callback(sender.close)
    target = on_a_gpu(decode)
    sender.connect(target)
    assert sender.frame_sizes(target) == HOST_FRAMES
    sender.send(target, b"header", placed(sender, target, 0, 64).fill_(5))
    transport = decode.receiver._transport
    while not (arrivals := transport.receive(1)):
        time.sleep(0.001)
    assert transport.take(arrivals[0], 0, 64).tolist() == [5] * 64
    assert asked == ["cuda-00"]


def test_a_segment_is_let_go_of_when_it_was_idle(open_ends: ExitStack) -> None:
    now, lent = 0.0, []

    def lend(name: str) -> Somewhere:
        lent.append(Somewhere(name))
        return lent[-1]

    target = on_a_gpu(DecodeRank(open_ends))
    sender = HostSender(TcpSender(lambda: now), host_id(), {"cuda_ipc": lend}, lambda: now)
    open_ends.callback(sender.close)
    sender.connect(target)
    assert sender.frame_sizes(target) == FrameSizes(64, 1024)
    now = 50.0
    placed(sender, target, 0, 64).fill_(5)
    now = 70.0
    sender.receive()
    assert [segment.closed for segment in lent] == [False]
    assert lent[0].bytes[:65].tolist() == [5] * 64 + [0]
    with pytest.raises(TransferFailed, match="has 4096 bytes; a frame ends at 4097"):
        sender.place(target, 4033, 64)
    now = 140.0
    sender.receive()
    sender.place(target, 0, 64)
    assert [segment.closed for segment in lent] == [True, False]
    open_ends.close()
    assert [segment.closed for segment in lent] == [True, True]


def test_oversized_messages_and_strangers_do_no_harm(open_ends: ExitStack) -> None:
    decode = DecodeRank(open_ends)
    stranger: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    with stranger:
        stranger.linger = 0
        stranger.connect(decode.endpoint.address)
        stranger.send_multipart([b"", b"", b"", b""])
        stranger.send(b"x" * 20_000)
        stranger.send(b"x" * (MOST_BYTES + 1))
        port = int(decode.endpoint.address.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(os.urandom(4096))
            raw.shutdown(socket.SHUT_WR)
            # Until it hangs up: libzmq aborts the process where its first protocol meets a socket that is closing.
            with suppress(ConnectionError):
                while raw.recv(4096):
                    pass
        deadline = time.monotonic() + 10
        while decode.receiver.rejected < 2 and time.monotonic() < deadline:
            assert decode.receiver.poll() == []
    assert decode.receiver.rejected >= 2, "noise may parse as messages of ZeroMQ's first protocol"
    assert decode.receiver.resident == {}


def test_idle_connections_are_closed() -> None:
    now = 0.0
    sender = TcpSender(lambda: now)
    sender.send(RankEndpoint("tcp://127.0.0.1:9", "tcp", "", "", 0, 0), b"header")
    sender.receive()
    assert len(sender.sockets) == 1
    now = 61.0
    sender.receive()
    assert sender.sockets == []


def test_a_segment_is_private_and_unlinked(open_ends: ExitStack) -> None:
    segment = open_ends.enter_context(closing(ShmSegment(CLUSTER, 4096)))
    path = FOLDER / segment.name
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ShmMapping(segment.name).bytes[:4] = 7
    assert segment.bytes[:5].tolist() == [7, 7, 7, 7, 0]
    open_ends.close()
    assert not path.exists()


def test_a_segment_without_room_is_refused() -> None:
    with pytest.raises(InsufficientResources, match="/dev/shm has no room for"):
        ShmSegment(CLUSTER, 1 << 50)


def test_sweep_removes_only_what_the_dead_left(open_ends: ExitStack) -> None:
    script = f"import os; from splitserve.kv_transfer.shm import ShmSegment; ShmSegment({CLUSTER!r}, 4096); os._exit(9)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    living = open_ends.enter_context(closing(ShmSegment(CLUSTER, 4096)))
    (left_over,) = [path.name for path in FOLDER.glob(f"splitserve-{CLUSTER}-*") if path.name != living.name]
    assert sweep(CLUSTER[:-1]) == []
    assert sweep(CLUSTER) == [left_over]
    assert sweep(CLUSTER) == []
    assert (FOLDER / living.name).exists()


def test_sweep_leaves_files_of_other_users_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They could not be removed, or should not be."""
    file = FOLDER / f"splitserve-{CLUSTER}-4194999-0123abcd"
    file.touch()
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert sweep(CLUSTER) == []
    monkeypatch.undo()
    assert sweep(CLUSTER) == [file.name]


def test_sweep_spares_a_segment_whose_maker_it_cannot_see(open_ends: ExitStack) -> None:
    """In another container the maker has another pid, but it holds the lock."""
    segment = open_ends.enter_context(closing(ShmSegment(CLUSTER, 4096)))
    renamed = segment.name.replace(f"-{os.getpid()}-", "-4194999-")
    (FOLDER / segment.name).rename(FOLDER / renamed)
    segment.name = renamed
    assert sweep(CLUSTER) == []
