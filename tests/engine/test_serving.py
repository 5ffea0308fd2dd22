"""The loop of an engine that drains: reservations are refused, what is there ends, and then it is done."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from splitserve.cluster.channel import WorkerChannel
from splitserve.cluster.codec import pack, unpack
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import Busy, Cancel, Reserve
from splitserve.cluster.sampling import SamplingParams
from splitserve.engine.serving import SETTLE_S, Drain, serve
from tests.deploy.clusters import wait_until

LAYOUT = KvLayout(tp=1, num_layers=1, planes=2, num_kv_heads=1, head_dim=1, page_size=16, dtype="float32")


class Holding:
    """An engine that holds a request from its Reserve to its Cancel."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.sockets: list[Any] = []

    def handle(self, router: bytes, item: Any) -> None:
        if isinstance(item, Reserve):
            self.held.add(item.request_id)
        elif isinstance(item, Cancel):
            self.held.discard(item.request_id)

    def step(self) -> bool:
        return False

    def expire(self) -> None: ...

    def forget(self, router: bytes) -> None: ...

    def stats(self) -> Any:
        return Cancel("stats", 0)  # any message will do

    @property
    def idle(self) -> bool:
        return not self.held


class Serving:
    """The loop in a thread of its own, and a router's socket to it."""

    def __init__(self) -> None:
        self.engine, self.drain, self._over = Holding(), Drain(), threading.Event()
        channel = WorkerChannel("127.0.0.1")
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.connect(channel.address)
        arguments = (self.engine, channel, self._over.is_set, 60.0, self.drain)
        self._thread = threading.Thread(target=serve, args=arguments)
        self._thread.start()

    def reserve(self, name: str) -> None:
        self._socket.send(pack(Reserve(name, 1, [1], SamplingParams(), LAYOUT, 9.0)))

    def cancel(self, name: str) -> None:
        self._socket.send(pack(Cancel(name, 1)))

    def busy(self) -> Busy:
        """The next refusal."""
        while self._socket.poll(5000):
            item = unpack(self._socket.recv())
            if isinstance(item, Busy):
                return item
        raise AssertionError("no refusal came")

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close(linger=0)


@pytest.fixture
def serving() -> Iterator[Serving]:
    running = Serving()
    yield running
    running.close()


def test_a_drain_ends_when_the_last_request_has(serving: Serving) -> None:
    serving.reserve("a")
    wait_until(lambda: serving.engine.held == {"a"}, 5, "the reservation is there")
    serving.drain.wanted = True
    serving.reserve("b")
    assert serving.busy().request_id == "b"
    assert serving.engine.held == {"a"}
    threading.Event().wait(2 * SETTLE_S)
    assert not serving.drain.is_done
    serving.cancel("a")
    wait_until(lambda: serving.drain.is_done, 5, "it has drained")
    assert serving.engine.held == set()


def test_a_drain_that_is_taken_back(serving: Serving) -> None:
    serving.drain.wanted = True
    wait_until(lambda: serving.drain.is_done, 5, "it has drained")
    serving.drain.wanted = False
    wait_until(lambda: not serving.drain.is_done, 5, "it has not, any more")
    serving.reserve("a")
    wait_until(lambda: serving.engine.held == {"a"}, 5, "the reservation is there")
