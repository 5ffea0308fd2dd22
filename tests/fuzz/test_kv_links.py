"""What the two ends of a link say to each other, spoilt: payloads land where they were announced, or not at all."""

from __future__ import annotations

import time
from typing import Any, cast

import torch
from hypothesis import given
from hypothesis import strategies as st

from splitserve.cluster.channel import Socket
from splitserve.cluster.errors import ProtocolError
from splitserve.kv_transfer.linked import MARK, KvPut, LinkedReceiver
from splitserve.kv_transfer.protocol import unseal
from splitserve.kv_transfer.tcp import TcpReceiver
from splitserve.kv_transfer.transport import Arrival
from tests.fuzz.mutate import bounded, changed, fuzz, mutated
from tests.fuzz.test_kv_frames import resealed

STAGING = 4096
MAX_LINKS = 2
TREES: list[Any] = [["KvMeet", "t"], ["KvPut", "t", 1, 64, 128], ["KvPut", "t", 2, 1024, 3072], ["KvPart", "t", "bye"]]
MESSAGES = changed(TREES).map(resealed) | mutated([resealed(tree) for tree in TREES])


class Box:
    """A control connection: what is put in comes out."""

    sockets: list[Socket] = []  # noqa: RUF012

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


@fuzz
@given(st.lists(st.tuples(st.sampled_from([b"p", b"q"]), MESSAGES, st.sampled_from([b"header", None])), max_size=8))
def test_what_senders_say(said: list[tuple[bytes, bytes, bytes | None]]) -> None:
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
    assert {(place.data_ptr() - staging.data_ptr(), place.numel()) for place in pair.places} <= announced
    receiver.close()


def read(message: bytes) -> object:
    try:
        return unseal(message)
    except ProtocolError:
        return None
