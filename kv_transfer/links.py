"""One end of a link: a communicator of two GPUs that carries payloads one way, in the order in which they were sent.

    connecting --both have met--> up --idle, no progress, the other end's word--> down
        +----------------------- nobody came ---------------------------------------^

A link that is down stays so. Its communicator is aborted in the background, and the next one has another token.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch


class Transit(Protocol):
    def is_completed(self) -> bool: ...


class Pair(Protocol):
    """A communicator. Transits of one pair follow one another; each needs its opposite on the other end."""

    def send(self, payload: torch.Tensor) -> Transit: ...

    def receive(self, place: torch.Tensor) -> Transit: ...

    def abort(self) -> None:
        """End all transits, wherever they stand. May take a second."""


@dataclass(frozen=True)
class _UnderWay:
    transit: Transit
    held: torch.Tensor  # a device reads or writes it until the transit ends
    began: float


class Link:
    """`meet` makes the communicator, in a thread, once the other end does the same.

    A transit that takes longer than `patience_s` takes the link down. `clock` gives seconds, monotonic.
    """

    def __init__(self, token: str, meet: Callable[[], Pair], patience_s: float, clock: Callable[[], float]) -> None:
        self.token, self.reason = token, ""
        self.used_at = clock()
        self._patience_s, self._clock = patience_s, clock
        self._pair: Pair | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._under_way: deque[_UnderWay] = deque()
        self._thread = threading.Thread(target=self._meet, args=(meet,), name=f"link {token}", daemon=True)
        self._thread.start()

    @property
    def state(self) -> Literal["connecting", "up", "down"]:
        if self._over.is_set():
            return "down"
        return "connecting" if self._pair is None else "up"

    @property
    def idle(self) -> bool:
        return not self._under_way

    def send(self, payload: torch.Tensor) -> None:
        assert self._pair is not None
        self._begin(self._pair.send, payload)

    def receive(self, place: torch.Tensor) -> None:
        assert self._pair is not None
        self._begin(self._pair.receive, place)

    def completed(self) -> int:
        """How many transits have ended since the last call. A link that makes no progress goes down."""
        count = 0
        while self._under_way and self.state == "up":
            first = self._under_way[0]
            if first.transit.is_completed():
                self._under_way.popleft()
                count += 1
            elif self._clock() - first.began > self._patience_s:
                self.drop(f"no progress for {self._patience_s:g} s")
            else:
                break
        return count

    def drop(self, reason: str) -> None:
        """Take the link down; what was under way is lost."""
        with self._lock:
            if self._over.is_set():
                return
            self.reason = reason
            self._over.set()
            pair, held = self._pair, list(self._under_way)
        self._under_way.clear()
        if pair is not None:
            self._thread = threading.Thread(target=_abort, args=(pair, held), name=f"end of {self.token}", daemon=True)
            self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for what goes on in the background; whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _begin(self, start: Callable[[torch.Tensor], Transit], held: torch.Tensor) -> None:
        self.used_at = self._clock()
        try:
            self._under_way.append(_UnderWay(start(held), held, self.used_at))
        except RuntimeError as error:
            self.drop(str(error))

    def _meet(self, meet: Callable[[], Pair]) -> None:
        try:
            pair = meet()
        except Exception as error:  # torch raises several unrelated types
            self.drop(f"the other end was not met: {error}")
            return
        with self._lock:
            if not self._over.is_set():
                self._pair = pair
                return
        pair.abort()


def _abort(pair: Pair, held: list[_UnderWay]) -> None:
    pair.abort()
    held.clear()
