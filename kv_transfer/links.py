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

IDLE = "not used"
PATIENCE_S = 3.0  # a payload takes milliseconds: one that takes this long has lost its other end
LOOKS = 4  # at a link's progress, in the time after which it goes down


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
    """`meet` makes the communicator, once the other end does the same.

    A transit that takes longer than `patience_s` takes the link down. A thread sees to that: whoever uses the link may
    itself be kept waiting by a transit that does not end, in any call of the driver's that waits for the whole device.
    `clock` gives seconds, monotonic.
    """

    def __init__(self, token: str, meet: Callable[[], Pair], patience_s: float, clock: Callable[[], float]) -> None:
        self.token, self.reason = token, ""
        self.used_at = clock()
        self._patience_s, self._clock = patience_s, clock
        self._pair: Pair | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._under_way: deque[_UnderWay] = deque()
        self._thread = threading.Thread(target=self._live, args=(meet,), name=f"link {token}", daemon=True)
        self._thread.start()

    @property
    def state(self) -> Literal["connecting", "up", "down"]:
        if self._over.is_set():
            return "down"
        return "connecting" if self._pair is None else "up"

    @property
    def idle(self) -> bool:
        return not self._under_way

    @property
    def is_aborting(self) -> bool:
        """Whether it is down, and its communicator still there."""
        return self.state == "down" and self._pair is not None and self._thread.is_alive()

    def send(self, payload: torch.Tensor) -> None:
        assert self._pair is not None
        self._begin(self._pair.send, payload)

    def receive(self, place: torch.Tensor) -> None:
        assert self._pair is not None
        self._begin(self._pair.receive, place)

    def completed(self) -> int:
        """How many transits have ended since the last call."""
        count = 0
        while self.state == "up" and self._under_way and self._under_way[0].transit.is_completed():
            self._under_way.popleft()
            count += 1
        return count

    def drop(self, reason: str) -> None:
        """Take the link down; what was under way is lost."""
        with self._lock:
            if not self._over.is_set():
                self.reason = reason
                self._over.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for a link that is down; whether nothing of it goes on any more."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _begin(self, start: Callable[[torch.Tensor], Transit], held: torch.Tensor) -> None:
        self.used_at = self._clock()
        try:
            self._under_way.append(_UnderWay(start(held), held, self.used_at))
        except RuntimeError as error:
            self.drop(str(error))

    def _live(self, meet: Callable[[], Pair]) -> None:
        try:
            pair = self._pair = meet()
        except Exception as error:  # torch raises several unrelated types
            self.drop(f"the other end was not met: {error}")
            return
        while not self._over.wait(self._patience_s / LOOKS):
            oldest = next(iter(self._under_way.copy()), None)
            if oldest is not None and self._clock() - oldest.began > self._patience_s:
                self.drop(f"no progress for {self._patience_s:g} s")
        pair.abort()


def make_room(links: list[Link], ending: list[Link], most: int) -> bool:
    """Whether another link may be made, after the idle one that was used longest ago has left, where that helps.

    An end that is down counts while it has its communicator: one that has met nobody may wait for that for good.
    """
    if len(links) + sum(link.is_aborting for link in ending) < most:
        return True
    idle = [link for link in links if link.state == "up" and link.idle]
    if idle:
        min(idle, key=lambda link: link.used_at).drop(IDLE)
    return False


def not_over(ending: list[Link]) -> list[Link]:
    return [link for link in ending if not link.join(0)]
