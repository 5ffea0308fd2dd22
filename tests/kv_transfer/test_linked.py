"""Payloads through links: set up behind the traffic, given up when they make no progress, made again."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import pytest
import torch

from splitserve.cluster.channel import KV_IDLE_S, CurveKeys
from splitserve.cluster.errors import TransferFailed
from splitserve.cluster.messages import RankEndpoint
from splitserve.cluster.topology import PACKED_BYTES
from splitserve.kv_transfer.link_messages import MARK, KvPut
from splitserve.kv_transfer.linked_receiver import LinkedReceiver
from splitserve.kv_transfer.linked_sender import RETRY_S, LinkedSender
from splitserve.kv_transfer.links import Link
from splitserve.kv_transfer.protocol import seal
from splitserve.kv_transfer.segments import HostSender
from splitserve.kv_transfer.staging import HOST_FRAMES, LINK_FRAMES
from splitserve.kv_transfer.tcp import TcpReceiver, TcpSender
from splitserve.kv_transfer.transport import Arrival
from tests.kv_transfer.pairs import Exchange, FakePair

CPU = torch.device("cpu")
HEADER = b"\x93 a header"


class Clock:
    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


class Ends:
    """Senders and a receiver that can be linked."""

    def __init__(self, stack: ExitStack, max_links: int = 4, senders: int = 1, patience_s: float = 5.0) -> None:
        self.exchange, self.clock = Exchange(patience_s), Clock()
        control, self.staging = TcpReceiver("127.0.0.1"), torch.zeros(4096, dtype=torch.uint8)
        self.receiver = LinkedReceiver(control, self.staging, self.exchange.meet, max_links, self.clock)
        self.target = RankEndpoint(control.endpoint, "nccl", "", "", 0, 4096, link="here")
        self.senders = [
            LinkedSender(TcpSender(self.clock), CPU, lambda _, token: self.exchange.meet(token), max_links, self.clock)
            for _ in range(senders)
        ]
        self.arrivals: list[Arrival] = []
        stack.enter_context(closing(self.receiver))
        for sender in self.senders:
            stack.enter_context(closing(sender))

    @property
    def sender(self) -> LinkedSender:
        return self.senders[0]

    def until(self, there: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < deadline
            for sender in self.senders:
                sender.receive()
            self.arrivals += self.receiver.receive(8)
            time.sleep(0.0005)

    def link(self, sender: LinkedSender | None = None) -> None:
        sender = sender or self.sender
        sender.connect(self.target)
        self.until(lambda: is_up(sender) and any(link.state == "up" for link in self.receiver.links))

    def send(self, value: int, offset: int = 64, size: int = 128, sender: LinkedSender | None = None) -> None:
        payload = (sender or self.sender).place(self.target, offset, size)
        assert payload is not None
        (sender or self.sender).send(self.target, HEADER, payload.fill_(value), offset)


def is_up(sender: LinkedSender) -> bool:
    return [link.state for link in sender.links] == ["up"]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_payloads_cross_a_link_in_order_and_are_announced_when_they_are_there(stack: ExitStack) -> None:
    ends = Ends(stack)
    ends.link()
    assert (ends.sender.way(ends.target), ends.sender.links_up) == ("nccl", 1)
    assert ends.sender.frame_sizes(ends.target) == LINK_FRAMES
    for value in range(1, 9):
        ends.send(value, offset=256 * (value - 1))
    ends.until(lambda: len(ends.arrivals) == 8)
    assert {(arrival.header, arrival.payload) for arrival in ends.arrivals} == {(HEADER, None)}
    assert ends.staging[64::256][:8].tolist() == list(range(1, 9))
    assert ends.staging[200::256][:8].tolist() == [0] * 8
    assert not ends.receiver.busy


def test_the_largest_frame_goes_over_tcp_when_its_link_is_gone(stack: ExitStack) -> None:
    """In the clear and encrypted."""
    for keys in (None, CurveKeys.generate()):
        control = stack.enter_context(closing(TcpReceiver("127.0.0.1", keys)))
        sender = stack.enter_context(closing(TcpSender(time.monotonic, keys)))
        target = RankEndpoint(control.endpoint, "nccl", "", "", 0, LINK_FRAMES.most)
        payload = torch.ones(LINK_FRAMES.most, dtype=torch.uint8)
        sender.send(target, HEADER, payload)
        deadline, arrivals = time.monotonic() + 60, list[Arrival]()
        while not arrivals:
            assert time.monotonic() < deadline
            sender.receive()
            arrivals = control.receive(8)
        assert torch.equal(control.take(arrivals[0], 0, LINK_FRAMES.most), payload)


def test_a_link_goes_down_by_itself_while_its_user_is_kept_waiting() -> None:
    """By a call of the driver's, say, that waits for all that runs on the device, the stuck transit among it."""
    exchange = Exchange()
    link, _ = (Link("t", lambda: exchange.meet("t"), 0.2, time.monotonic) for _ in range(2))
    while link.state == "connecting":
        time.sleep(0.001)
    link.send(torch.ones(8))
    time.sleep(0.5)
    assert link.state == "down"
    assert link.reason == "no progress for 0.2 s"
    assert link.join(1.0)
    assert sum(pair.aborted for pair in exchange.pairs) == 1


def test_an_end_that_waits_for_good_keeps_no_other_from_its_place(stack: ExitStack) -> None:
    clock, stuck = Clock(), threading.Event()
    stack.callback(stuck.set)

    def meet(endpoint: str, token: str) -> FakePair:
        if endpoint == "gone":
            stuck.wait()
        raise TransferFailed("nobody is there")

    sender = stack.enter_context(closing(LinkedSender(TcpSender(clock), CPU, meet, 1, clock)))
    gone, there = (RankEndpoint("tcp://127.0.0.1:9", "nccl", "", "", 0, 64, link=link) for link in ("gone", "there"))
    sender.connect(gone)
    (first,) = sender.links
    first.drop("its receiver has left")
    sender.receive()
    clock.ahead += RETRY_S[1]
    sender.connect(there)
    (second,) = sender.links
    assert second is not first
    assert not first.join(0)


def test_no_link_is_made_to_where_memory_reaches(stack: ExitStack) -> None:
    ends = Ends(stack)
    here, elsewhere = (replace(ends.target, transport="cuda_ipc", host=host, segment="s") for host in ("here", "there"))
    segment = types.SimpleNamespace(bytes=ends.staging, frame_sizes=LINK_FRAMES, close=lambda: None)
    sender = HostSender(ends.sender, "here", {"cuda_ipc": lambda _: segment}, ends.clock)
    sender.connect(here)
    assert ends.sender.links == []
    sender.connect(elsewhere)
    assert len(ends.sender.links) == 1


def test_until_a_link_is_up_payloads_go_over_tcp(stack: ExitStack) -> None:
    ends = Ends(stack)
    assert ends.sender.way(ends.target) == "tcp"
    ends.sender.connect(ends.target)
    assert (ends.sender.way(ends.target), ends.sender.links_up) == ("tcp", 0)
    assert ends.sender.frame_sizes(ends.target) == HOST_FRAMES
    ends.send(5)
    ends.until(lambda: len(ends.arrivals) == 1)
    assert ends.receiver.take(ends.arrivals[0], 64, 128).tolist() == [5] * 128
    with pytest.raises(TransferFailed, match="found 128 bytes, expected 64"):
        ends.receiver.take(ends.arrivals[0], 64, 64)
    assert not ends.staging.any()


def test_targets_without_links_get_theirs_over_tcp(stack: ExitStack) -> None:
    ends = Ends(stack)
    ends.target = RankEndpoint(ends.target.address, "tcp", "", "", 0, 4096)
    ends.sender.connect(ends.target)
    ends.send(5)
    ends.until(lambda: len(ends.arrivals) == 1)
    assert ends.sender.links == []
    assert ends.receiver.take(ends.arrivals[0], 64, 128).tolist() == [5] * 128


@pytest.mark.parametrize("fault", ["stuck", "broken"])
def test_a_link_without_progress_is_dropped_and_another_one_made(stack: ExitStack, fault: str) -> None:
    ends = Ends(stack)
    ends.link()
    first = ends.sender.links[0].token
    setattr(ends.exchange, fault, True)
    ends.send(5)
    ends.until(lambda: ends.sender.links == [] and ends.receiver.links == [])
    assert all(pair.aborted for pair in ends.exchange.pairs)
    assert ends.arrivals == []
    ends.send(6)
    ends.until(lambda: len(ends.arrivals) == 1)
    assert ends.receiver.take(ends.arrivals[0], 64, 128).tolist() == [6] * 128, "over TCP in the meantime"
    setattr(ends.exchange, fault, False)
    ends.clock.ahead += 2.0
    ends.link()
    assert ends.sender.links[0].token != first
    ends.send(7)
    ends.until(lambda: len(ends.arrivals) == 2)
    assert ends.staging[64:192].tolist() == [7] * 128


def test_a_receiver_that_does_not_come_is_asked_again_ever_less_often(stack: ExitStack) -> None:
    ends = Ends(stack, patience_s=0.2)
    sender, asked = ends.sender, []
    for _ in range(6):
        sender.connect(ends.target)
        began = time.monotonic()
        while sender.links and time.monotonic() < began + 5:
            sender.receive()
            time.sleep(0.001)
        assert sender.links == []
        waited = 0.0
        while not sender.links:
            waited, ends.clock.ahead = waited + 0.25, ends.clock.ahead + 0.25
            sender.connect(ends.target)
        asked.append(waited)
    assert asked == sorted(asked)
    assert 0.5 <= asked[0] <= 1.5
    assert 20 <= asked[-1] <= 30


def test_as_many_links_as_there_is_memory_for_and_the_idle_ones_leave(stack: ExitStack) -> None:
    ends = Ends(stack, max_links=2, senders=3)
    for sender in ends.senders[:2]:
        sender.connect(ends.target)
    ends.until(lambda: all(is_up(sender) for sender in ends.senders[:2]))
    ends.until(lambda: [link.state for link in ends.receiver.links] == ["up", "up"])
    ends.senders[1].connect(ends.target)
    ends.send(1, sender=ends.senders[1])
    ends.until(lambda: len(ends.arrivals) == 1)
    ends.senders[2].connect(ends.target)
    ends.until(lambda: ends.senders[0].links == [])
    ends.until(lambda: ends.senders[2].links == [], seconds=10)
    ends.clock.ahead += 2.0
    ends.senders[2].connect(ends.target)
    ends.until(lambda: is_up(ends.senders[1]) and is_up(ends.senders[2]))
    assert len(ends.receiver.links) == 2


def test_idle_links_are_dropped_without_blame(stack: ExitStack) -> None:
    ends = Ends(stack)
    ends.link()
    ends.clock.ahead += KV_IDLE_S + 1
    ends.until(lambda: ends.sender.links == [] and ends.receiver.links == [])
    ends.link()


def test_what_is_packed_and_not_yet_across_is_bounded(stack: ExitStack) -> None:
    ends = Ends(stack)
    ends.link()
    ends.exchange.stuck = True
    held = [ends.sender.place(ends.target, 0, PACKED_BYTES // 2) for _ in range(2)]
    assert ends.sender.place(ends.target, 0, 64) is None
    held.pop()
    assert ends.sender.place(ends.target, 0, 64) is not None


@pytest.mark.parametrize("put", [(2, 0, 64), (1, 4090, 64), (1, -64, 32), (1, 0, 0)])
def test_a_put_that_cannot_be_ends_the_link(stack: ExitStack, put: tuple[int, int, int]) -> None:
    ends = Ends(stack)
    ends.link()
    ends.sender._control.send_parts(ends.target, [MARK + seal(KvPut(ends.sender.links[0].token, *put)), HEADER])
    ends.until(lambda: ends.sender.links == [] and ends.receiver.links == [])
    assert ends.arrivals == []


@pytest.mark.parametrize("noise", [MARK, MARK + b"x" * 100, MARK + seal(KvPut("someone else's", 1, 0, 64))])
def test_noise_changes_nothing(stack: ExitStack, noise: bytes) -> None:
    ends = Ends(stack)
    ends.link()
    ends.sender._control.send_parts(ends.target, [noise, HEADER])
    ends.sender._control.send_parts(ends.target, [noise])
    ends.send(3)
    ends.until(lambda: len(ends.arrivals) == 1)
    assert is_up(ends.sender)


def test_a_dead_sender_leaves_no_receive_behind(stack: ExitStack) -> None:
    ends = Ends(stack)
    ends.link()
    token = ends.sender.links[0].token
    ends.sender._control.send_parts(ends.target, [MARK + seal(KvPut(token, 1, 0, 64)), HEADER])
    ends.until(lambda: ends.receiver.busy)
    ends.until(lambda: ends.receiver.links == [], seconds=5)
    assert not ends.receiver.busy
    ends.until(lambda: ends.sender.links == [])
    assert all(pair.aborted for pair in ends.exchange.pairs)
