"""What the two ends of a link say to each other, spoilt: payloads land where they were announced, or not at all."""

from __future__ import annotations

import threading
import time
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitserve.cluster.channel import Pollable
from splitserve.cluster.errors import ProtocolError
from splitserve.kv_transfer.link_messages import MARK, KvPart, KvPut
from splitserve.kv_transfer.linked_receiver import MOST_ENDING, LinkedReceiver
from splitserve.kv_transfer.protocol import unseal
from splitserve.kv_transfer.tcp import TcpReceiver
from splitserve.kv_transfer.transport import Arrival
from tests.fuzz.mutate import bounded, changed, fuzz, mutated
from tests.fuzz.test_kv_frames import resealed

STAGING = 4096
MAX_LINKS = 1
TREES: list[Any] = [["KvMeet", "t"], ["KvPut", "t", 1, 64, 128], ["KvPut", "t", 2, 1024, 3072], ["KvPart", "t", "bye"]]
MESSAGES = changed(TREES).map(resealed) | mutated([resealed(tree) for tree in TREES])


class Box:
    """A control connection: what is put in comes out."""

    sockets: list[Pollable] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.waiting: list[Arrival] = []
        self.said: list[bytes] = []

    def receive(self, limit: int) -> list[Arrival]:
        taken, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return taken

    def send(self, peer: bytes, header: bytes) -> None:
        self.said.append(header)

    def close(self) -> None:
        """Nothing to close."""


class Posted:
    """A communicator that ends each receive at once, and keeps where it was to land."""

    def __init__(self) -> None:
        self.places: list[torch.Tensor] = []

    def send(self, payload: torch.Tensor) -> Posted:
        return self

    def receive(self, place: torch.Tensor) -> Posted:
        self.places.append(place)
        return self

    def is_completed(self) -> bool:
        return True

    def abort(self) -> None:
        """Nothing is under way."""


Said = list[tuple[bytes, bytes, bytes | None]]


@fuzz
@given(st.lists(st.tuples(st.sampled_from([b"p", b"q"]), MESSAGES, st.sampled_from([b"header", None])), max_size=8))
def test_what_senders_say(said: Said) -> None:
    check(said)


@pytest.mark.parametrize(("offset", "size"), [(-64, 128), (STAGING - 64, 128), (0, 2**40), (64, 0), (64, -1)])
def test_places_that_staging_does_not_have(offset: int, size: int) -> None:
    assert check([(b"p", resealed(["KvPut", "t", 1, offset, size]), b"header")]) == set()


def test_places_that_staging_has() -> None:
    assert check([(b"p", resealed(tree), b"header") for tree in TREES[1:3]]) == {(64, 128), (1024, 3072)}


def test_more_links_than_there_is_memory_for() -> None:
    check([(peer, resealed(["KvMeet", "t"]), None) for peer in (b"q", b"r", b"s")])


def test_a_peer_that_always_wants_another_link_takes_few_threads() -> None:
    """Each end that meets nobody is a thread until it has waited long enough."""
    box, over = Box(), threading.Event()

    def meet(token: str) -> Posted:
        over.wait(60)
        return Posted()

    receiver = LinkedReceiver(cast(TcpReceiver, box), torch.zeros(STAGING), meet, MAX_LINKS, time.monotonic)
    before = threading.active_count()
    for number in range(500):
        box.waiting.append(Arrival(b"p", MARK + resealed(["KvMeet", f"t{number}"]), None))
        receiver.receive(8)
    assert threading.active_count() - before <= MOST_ENDING + MAX_LINKS
    refusal = read(box.said[-1].removeprefix(MARK))
    assert isinstance(refusal, KvPart)
    assert (refusal.token, refusal.reason) == ("t499", "too many links have met nobody yet")
    over.set()
    until = time.monotonic() + 10
    while threading.active_count() > before + MAX_LINKS and time.monotonic() < until:
        time.sleep(0.01)
    box.waiting.append(Arrival(b"p", MARK + resealed(["KvMeet", "last"]), None))
    receiver.receive(8)
    assert [link.token for link in receiver.links] == ["last"], "who has waited long enough may meet again"
    receiver.close()


def check(said: Said) -> set[tuple[int, int]]:
    """Where receives were posted, as (offset, size) of staging, while a receiver with a link to p heard `said`."""
    box, pair, staging = Box(), Posted(), torch.zeros(STAGING, dtype=torch.uint8)
    receiver = LinkedReceiver(cast(TcpReceiver, box), staging, lambda _: pair, MAX_LINKS, time.monotonic)
    with bounded():
        for peer, message, header in [(b"p", resealed(TREES[0]), None), *said]:
            box.waiting.append(Arrival(peer, MARK + message, None if header is None else memoryview(header)))
            receiver.receive(8)
            assert len(receiver.links) <= MAX_LINKS
            while any(link.state == "connecting" for link in receiver.links):
                time.sleep(0.0001)
        receiver.receive(8)
    announced = {(put.offset, put.size) for put in (read(message) for _, message, _ in said) if isinstance(put, KvPut)}
    posted = {(place.data_ptr() - staging.data_ptr(), place.numel()) for place in pair.places}
    assert posted <= announced
    receiver.close()
    return posted


def read(message: bytes) -> object:
    try:
        return unseal(message)[0]
    except ProtocolError:
        return None
